"""Euler sampling of a rectified flow, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# velocity(x [rows, C, H, W], sigma [rows], context [rows, tokens, dim], pooled [rows, dim]) -> like x
Velocity = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def sigmas(steps: int) -> list[float]:
    """The `steps` + 1 noise levels 1 … 0 that ComfyUI's "simple" schedule gives a FLUX model with shift 1."""
    return [1.0 - step / steps for step in range(steps + 1)]


@torch.no_grad()
def sample(model: Velocity, context: Tensor, pooled: Tensor, noise: Tensor, steps: int = 20, cfg: float = 1.0,
           uncond: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Latents [rows, C, H, W] (model space) for the prompts `context`, `pooled`, started from `noise`.

    `uncond` is the (context, pooled) of the empty prompt, each with one row; needed when `cfg` is not 1.
    """
    if cfg != 1.0 and uncond is None:
        raise ValueError(f"sample: cfg {cfg} needs `uncond`, the encoded empty prompt.")
    x, rows = noise, noise.shape[0]
    levels = sigmas(steps)
    for sigma, following in zip(levels, levels[1:]):
        t = torch.full((rows,), sigma, device=x.device)
        velocity = model(x, t, context, pooled).float()
        if cfg != 1.0 and uncond is not None:
            free = model(x, t, uncond[0].expand(rows, -1, -1), uncond[1].expand(rows, -1)).float()
            velocity = free + cfg * (velocity - free)
        x = x + (following - sigma) * velocity
    return x
