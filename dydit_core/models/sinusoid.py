"""The sinusoidal embedding of a number, which every model class here begins with."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sinusoid(values: Tensor, dim: int = 256, max_period: float = 10_000.0) -> Tensor:
    """[rows, dim], float32, of `values` [rows]: cosines, then sines, of falling frequencies (arXiv 2006.11239)."""
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=values.device) / half)
    angles = values.float()[:, None] * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
