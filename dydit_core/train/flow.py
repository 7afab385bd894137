"""The rectified-flow objective: x(sigma) = (1 − sigma) · picture + sigma · noise, velocity = noise − picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# sigma = sigmoid(SPREAD · normal + SHIFT), and for a share of the rows uniform, so that the ends are seen too.
SIGMA_SPREAD, SIGMA_SHIFT, UNIFORM_SHARE = 1.1, 0.1, 0.15


@dataclass(frozen=True)
class FlowBatch:
    """Inputs and target of one step; x and target are [rows, channels, height, width], sigma [rows]."""

    x: Tensor
    sigma: Tensor
    target: Tensor


def draw_sigmas(rows: int, generator: torch.Generator) -> Tensor:
    """Noise levels [rows] in 0…1, densest in the middle where shapes are decided."""
    sigma = torch.sigmoid(SIGMA_SPREAD * torch.randn(rows, generator=generator) + SIGMA_SHIFT)
    uniform = torch.rand(rows, generator=generator)
    return torch.where(torch.rand(rows, generator=generator) < UNIFORM_SHARE, uniform, sigma)


def noisy(latents: Tensor, generator: torch.Generator, sigma: Tensor | None = None) -> FlowBatch:
    """Mix `latents` with fresh noise at `sigma` (drawn if not given)."""
    if sigma is None:
        sigma = draw_sigmas(len(latents), generator)
    noise = torch.randn(latents.shape, generator=generator)
    level = sigma[:, None, None, None]
    return FlowBatch(torch.lerp(latents, noise, level), sigma, noise - latents)
