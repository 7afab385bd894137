"""A skipped token keeps its residual as it is (DyDiT, arXiv 2410.03456 §3.3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gather import gather, scatter_
from ..memory import Rowless
from ..parts import Extent, Kept


@dataclass(frozen=True)
class Nothing:
    needs_history = False

    def start(self) -> NothingState:
        return NothingState()

    def row_bytes(self, extent: Extent) -> int:
        return 0


class NothingState(Rowless):
    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Sequence[Tensor]) -> Tensor:
        if kept is None:
            return torch.addcmul(residual, gate, values[0])
        residual = residual.clone()
        for (rows, tokens), part in zip(kept.parts, values):
            some = gather(residual[rows], tokens)
            scatter_(residual[rows], tokens, torch.addcmul(some, gate[rows], part))
        return residual
