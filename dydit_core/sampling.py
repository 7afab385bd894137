"""Euler sampling along d x / d sigma, in plain torch: of flow-matching models and of eps models alike."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from .models.dit import STEPS, eps_log_sigmas

# velocity(x [rows, C, H, W], of videos [rows, C, frames, H, W], sigma [rows], *conditioning) -> d x / d sigma, like x.
# `conditioning` is what the model is given besides, each [rows, …]: FLUX takes context [rows, tokens, dim] and pooled [rows, dim], DiT takes labels [rows].
Velocity = Callable[..., Tensor]
Conditioning = Sequence[Tensor]
Level = TypeVar("Level", float, Tensor)


def unsqueezed(values: Tensor, like: Tensor) -> Tensor:
    """`values` [rows, …] with as many axes as `like` [rows, …, C, H, W] has, so that each goes with all of its picture or video."""
    return values[(...,) + (None,) * (like.ndim - values.ndim)]


def sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps` + 1 noise levels 1 … 0 that ComfyUI's "simple" schedule gives a FLUX model; FLUX.1-dev has `shift` e^1.15."""
    return [shifted(1.0 - step / steps, shift) for step in range(steps + 1)]


def shifted(sigma: Level, shift: float) -> Level:
    """The noise level(s) in 0…1 that stand in place of `sigma`: higher ones for a `shift` above 1 (SD3, arXiv 2403.03206, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def eps_sigmas(steps: int) -> list[float]:
    """The `steps` + 1 noise levels, 157 … 0, that it gives a DiT: those of evenly spaced timesteps."""
    levels = eps_log_sigmas().exp()
    return [float(levels[STEPS - 1 - step * STEPS // steps]) for step in range(steps)] + [0.0]


@torch.no_grad()
def sample(model: Velocity, conditioning: Conditioning, noise: Tensor, steps: int = 20, cfg: float = 1.0,
           uncond: Conditioning | None = None, schedule: Sequence[float] | None = None) -> Tensor:
    """Latents [rows, C, H, W] (model space), started from `noise` at the first noise level (for `eps_sigmas`: times that level).

    `uncond` is what stands for no condition, each with one row; needed when `cfg` is not 1. `schedule`: steps + 1 falling
    sigmas, where they are not `sigmas(steps)`.
    """
    if cfg != 1.0 and uncond is None:
        raise ValueError(f"sample: cfg {cfg} needs `uncond`, the encoded empty prompt.")
    x, rows = noise, noise.shape[0]
    levels = schedule or sigmas(steps)
    for sigma, following in zip(levels, levels[1:]):
        t = torch.full((rows,), sigma, device=x.device)
        velocity = model(x, t, *conditioning).float()
        if cfg != 1.0 and uncond is not None:
            free = model(x, t, *(part.expand(rows, *part.shape[1:]) for part in uncond)).float()
            velocity = free + cfg * (velocity - free)
        x = x + (following - sigma) * velocity
    return x
