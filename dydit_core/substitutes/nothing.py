"""A skipped token keeps its residual as it is (DyDiT, arXiv 2410.03456 §3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kept import Kept
from ..memory import Rowless
from ..parts import Extent


@dataclass(frozen=True)
class Nothing:
    needs_history = False

    def start(self) -> NothingState:
        return NothingState()

    def row_bytes(self, extent: Extent) -> int:
        return 0


class NothingState(Rowless):
    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        if kept is None:
            return torch.addcmul(residual, gate, values)
        copy = residual.clone(memory_format=torch.contiguous_format)
        return kept.put_(copy, torch.addcmul(kept.take(residual), kept.take(gate), values))
