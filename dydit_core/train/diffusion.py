"""What DiT, SiT and Latte learn: the noise in a picture or video, with its variance, or the velocity towards it; by class.

EPS: DDPM on DiT's 1000 timesteps. The variance half of the output learns from the variational bound alone (arXiv
2102.09672 §3.1), with the predicted noise held fixed in it. Its last term is a Gaussian's continuous likelihood: the
authors' code counts bins of 8-bit pixels there, which latents do not have.
FLOW: SiT's linear path (arXiv 2401.08740) with noise levels as in `flow`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..ddpm import chain
from ..models.dit import EPS, STEPS, DiT, timestep
from ..models.latte import Latte
from ..sampling import shifted, unsqueezed
from .base import Run, Stage, cut_windows, init
from .flow import noisy, sigma_at

Network = TypeVar("Network", DiT, Latte)

LABEL_DROPOUT = 0.1
# The fractional part of its multiples visits any length evenly.
GOLDEN = 0.6180339887498949


class Labelled(Protocol):
    """Pictures or videos with classes; rows are chosen by the caller."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(latents [rows, C, H, W] or [rows, C, frames, H, W] in fp32, labels [rows] in int64)."""
        ...


@dataclass(frozen=True)
class Batch:
    """What the network is given (`x`, latents with noise, `time`, `labels` [rows], and in windows their `positions` [rows, tokens,
    width]) and what it is asked for (`target`, like x; where it is the noise, `step` [rows] says which of DiT's timesteps it is at)."""

    x: Tensor
    time: Tensor
    labels: Tensor
    positions: Tensor | None
    target: Tensor
    step: Tensor | None

    def predict(self, model: DiT | Latte, rows: slice, options: dict | None = None) -> Tensor:
        where = () if self.positions is None else (self.positions[rows],)
        return model(self.x[rows], self.time[rows], self.labels[rows], options, *where)


def draw_batch(model: DiT | Latte, data: Labelled, stage: Stage, generator: torch.Generator, shift: float = 1.0) -> Batch:
    """Random pictures or videos, a share of them without their class; any few neighbours are spread over all noise levels.

    `shift`: of the noise levels of FLOW, see `sampling.shifted`.
    """
    latents, labels = data.batch(torch.randint(len(data), (stage.batch,), generator=generator))
    labels = torch.where(torch.rand(stage.batch, generator=generator) < LABEL_DROPOUT, model.config.classes, labels)
    positions = None
    if stage.window is not None:
        latents, top, left = cut_windows(latents, model.patch_size, stage.window, generator)
        positions = _positions(model, top, left, stage.window)
    spread = (torch.arange(stage.batch) * GOLDEN + torch.rand(1, generator=generator)) % 1
    if model.config.prediction != EPS:
        sigma = sigma_at(spread, generator)
        flow = noisy(latents, generator, shifted(sigma, shift))
        return Batch(flow.x, timestep(flow.sigma, model.config.prediction), labels, positions, -flow.target, None)
    step, noise = (spread * STEPS).long(), torch.randn(latents.shape, generator=generator)
    kept = unsqueezed(chain(STEPS).kept[step].float(), latents)
    return Batch(kept.sqrt() * latents + (1 - kept).sqrt() * noise, step.float(), labels, positions, noise, step)


def _positions(model: DiT, top: Tensor, left: Tensor, side: int) -> Tensor:
    """[rows, side², width]: those of the tokens that a window shows."""
    whole = math.isqrt(model.pos_embed.shape[1])
    steps = torch.arange(side)
    index = (top[:, None, None] + steps[:, None]) * whole + left[:, None, None] + steps
    return model.pos_embed[0][index.flatten(1)]


def error(predicted: Tensor, batch: Batch, rows: slice) -> Tensor:
    """Mean squared error [rows], with the variational bound of the variance where it is learned."""
    target = batch.target[rows]
    found, variance = predicted[:, : target.shape[1]], predicted[:, target.shape[1] :]
    square = (found - target).square().flatten(1).mean(1)
    if batch.step is None:
        return square
    return square + bound(found.detach() - target, variance, batch.step[rows])


def bound(off: Tensor, variance: Tensor, step: Tensor) -> Tensor:
    """The step's term of the variational bound in bits, mean over the numbers of a picture or video [rows]: KL divergence of the
    step back that the model takes from the true one, at the first timestep the negative log-likelihood of what is learned.

    `off`, like the latents: predicted less true noise; `variance`, like it: −1 for the true variance, 1 for the widest.
    """
    every = chain(STEPS)
    beta, kept, posterior = (part[step] for part in (every.beta, every.kept, every.posterior))
    reach = beta / ((1 - beta) * (1 - kept)).sqrt()  # how far an error of the noise moves the mean of the step back
    widest, true, reach = (unsqueezed(part.float(), off) for part in (beta.log(), posterior, reach))
    log_variance = torch.lerp(true, widest, (variance + 1) / 2)
    square = (reach * off).square() * torch.exp(-log_variance)
    divergence = 0.5 * (log_variance - true - 1 + torch.exp(true - log_variance) + square)
    likelihood = 0.5 * (math.log(2 * math.pi) + log_variance + square)
    bits = torch.where(unsqueezed(step == 0, off), likelihood, divergence) / math.log(2)
    return bits.flatten(1).mean(1)


def init_dit(model: Network) -> Network:
    """adaLN-zero, as the authors': every block starts as the identity, and the network with an answer of zero."""
    init(model, ("adaLN_modulation.1", "final_layer.linear"))
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.data.flatten(1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for embedding in (model.y_embedder.embedding_table, model.t_embedder.mlp[0], model.t_embedder.mlp[2]):
        nn.init.normal_(embedding.weight, std=0.02)
    return model


@dataclass(frozen=True)
class Denoising:
    """Objective: the diffusion loss of a DiT, SiT or Latte; `shift`: see `draw_batch`."""

    data: Labelled
    portion: int = 8
    shift: float = 1.0

    def __call__(self, run: Run, stage: Stage, generator: torch.Generator) -> Callable[[slice], Tensor]:
        batch = draw_batch(run.model, self.data, stage, generator, self.shift)
        return lambda rows: error(batch.predict(run.model, rows), batch, rows).sum() / stage.batch
