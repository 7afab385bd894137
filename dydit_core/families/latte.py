"""Latte's blocks run in parts: DiT's, whose tokens see those of their frame or those of their position (see `models.latte`).

DyDiT++ (arXiv 2504.06803 §5): tokens, heads and channels are decided in both kinds of block. A token is a patch of one
frame in both, so what a temporal block skips is shown, and reused, where it lies in the video.
"""

from __future__ import annotations

from torch import nn

from ..models.latte import SpatialBlock
from ..parts import Geometry
from .dit import DiTFamily


class LatteFamily(DiTFamily):
    name = "Latte"
    title = "Latte"
    model_parts = (*(part for part in DiTFamily.model_parts if part != "y_embedder"), "temp_embed", "config.frames")

    def names(self, model: nn.Module) -> list[str]:
        return [f"{'spatial' if isinstance(block, SpatialBlock) else 'temporal'} {index}" for index, block in enumerate(model.blocks)]

    def seen(self, model: nn.Module, index: int, geometry: Geometry) -> int:
        return model.config.positions if isinstance(model.blocks[index], SpatialBlock) else model.config.frames
