"""The rectified-flow objective: x(sigma) = (1 − sigma) · picture + sigma · noise, velocity = noise − picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..models.flux import Flux
from ..sampling import unsqueezed
from .base import Run, Stage, cut_windows, init

# sigma = sigmoid(SPREAD · normal + SHIFT), and for a share of the rows uniform, so that the ends are seen too.
SIGMA_SPREAD, SIGMA_SHIFT, UNIFORM_SHARE = 1.1, 0.1, 0.15
PROMPT_DROPOUT = 0.12


class Prompted(Protocol):
    """Pictures with prompts; rows are chosen by the caller."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [rows, C, H, W], contexts [rows, tokens, dim], pooled [rows, dim]), all fp32."""
        ...


@dataclass(frozen=True)
class FlowBatch:
    """Inputs and target of one step; x and target are like the latents, sigma [rows]."""

    x: Tensor
    sigma: Tensor
    target: Tensor


def draw_sigmas(rows: int, generator: torch.Generator) -> Tensor:
    """Noise levels [rows] in 0…1, densest in the middle where shapes are decided."""
    return sigma_at(torch.rand(rows, generator=generator), generator)


def sigma_at(place: Tensor, generator: torch.Generator) -> Tensor:
    """The noise levels [rows] that are found at `place` (0…1) when all are sorted; some of them anywhere."""
    sigma = torch.sigmoid(SIGMA_SPREAD * torch.special.ndtri(place.clamp(1e-6, 1 - 1e-6)) + SIGMA_SHIFT)
    return torch.where(torch.rand(len(place), generator=generator) < UNIFORM_SHARE, place, sigma)


def noisy(latents: Tensor, generator: torch.Generator, sigma: Tensor | None = None) -> FlowBatch:
    """Mix `latents` with fresh noise at `sigma` (drawn if not given)."""
    if sigma is None:
        sigma = draw_sigmas(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator)
    return FlowBatch(torch.lerp(latents, noise, unsqueezed(sigma, latents)), sigma, noise - latents)


def init_flux(model: Flux) -> Flux:
    init(model, ("mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear"))
    return model


@dataclass(frozen=True)
class FluxFlow:
    """Objective: mean squared error of a FLUX's velocity. `empty` is the encoded empty prompt, (context [1, …], pooled [1, …])."""

    data: Prompted
    empty: tuple[Tensor, Tensor]
    portion: int = 4

    def __call__(self, run: Run, stage: Stage, generator: torch.Generator) -> Callable[[slice], Tensor]:
        index = torch.randint(len(self.data), (stage.batch,), generator=generator)
        latents, context, pooled = self.data.batch(index, generator)
        dropped = torch.rand(stage.batch, generator=generator) < PROMPT_DROPOUT
        context = torch.where(dropped[:, None, None], self.empty[0], context)
        pooled = torch.where(dropped[:, None], self.empty[1], pooled)
        model, text_tokens = run.model, context.shape[1]
        latents, top, left = cut_windows(latents, model.config.patch_size, stage.window, generator)
        positions = model.positions(text_tokens, stage.window, stage.window).repeat(stage.batch, 1, 1)
        positions[:, text_tokens:, 1] += top[:, None]
        positions[:, text_tokens:, 2] += left[:, None]
        batch = noisy(latents, generator)

        def loss(rows: slice) -> Tensor:
            velocity = model(batch.x[rows], batch.sigma[rows], context[rows], pooled[rows], positions=positions[rows])
            return (velocity - batch.target[rows]).pow(2).sum() / batch.target.numel()

        return loss
