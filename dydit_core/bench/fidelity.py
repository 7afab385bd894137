"""How far one picture is from another (PSNR), and which of its tokens have detail."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

DETAIL = 0.06
_TOKEN_PIXELS = 16


def detailed(images: Tensor) -> Tensor:
    """Pixels [rows, 1, H, W] of the tokens (16 × 16 pixels) whose luminance varies by more than 0.06."""
    luminance = images.mean(1, keepdim=True)
    mean = F.avg_pool2d(luminance, _TOKEN_PIXELS)
    spread = (F.avg_pool2d(luminance.square(), _TOKEN_PIXELS) - mean.square()).clamp(min=0).sqrt()
    return F.interpolate((spread > DETAIL).float(), scale_factor=_TOKEN_PIXELS)


def psnr(images: Tensor, reference: Tensor, weight: Tensor | None = None) -> float:
    """Decibels from the squared error pooled over all images in 0…1 (and where `weight` is 1); inf if identical."""
    error = (images - reference).square().mean(1, keepdim=True)
    pooled = error.mean() if weight is None else (error * weight).sum() / weight.sum().clamp(min=1)
    return float(-10 * torch.log10(pooled))
