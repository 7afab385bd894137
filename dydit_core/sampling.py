"""Euler sampling of a rectified flow, in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# velocity(x [rows, C, H, W], sigma [rows], context [rows, tokens, dim], pooled [rows, dim]) -> like x
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sigmas(steps: int, shift: float = 1.0) -> list[float]:
    """The `steps` + 1 noise levels 1 … 0 that ComfyUI's "simple" schedule gives a FLUX model; FLUX.1-dev has `shift` e^1.15."""
    even = [1.0 - step / steps for step in range(steps + 1)]
    return [shift * sigma / (1 + (shift - 1) * sigma) for sigma in even]


@torch.no_grad()
def sample(model: Velocity, context: Tensor, pooled: Tensor, noise: Tensor, steps: int = 20, cfg: float = 1.0,
           uncond: tuple[Tensor, Tensor] | None = None, schedule: Sequence[float] | None = None) -> Tensor:
    """Latents [rows, C, H, W] (model space) for the prompts `context`, `pooled`, started from `noise`.

    `uncond` is the (context, pooled) of the empty prompt, each with one row; needed when `cfg` is not 1. `schedule`: steps + 1 falling
    sigmas, where they are not `sigmas(steps)`.
    """
    if cfg != 1.0 and uncond is None:
        raise ValueError(f"sample: cfg {cfg} needs `uncond`, the encoded empty prompt.")
    x, rows = noise, noise.shape[0]
    levels = schedule or sigmas(steps)
    for sigma, following in zip(levels, levels[1:]):
        t = torch.full((rows,), sigma, device=x.device)
        velocity = model(x, t, context, pooled).float()
        if cfg != 1.0 and uncond is not None:
            free = model(x, t, uncond[0].expand(rows, -1, -1), uncond[1].expand(rows, -1)).float()
            velocity = free + cfg * (velocity - free)
        x = x + (following - sigma) * velocity
    return x
