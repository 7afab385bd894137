"""Which tokens of a picture have detail."""

from __future__ import annotations

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
