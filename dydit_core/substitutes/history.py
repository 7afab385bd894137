"""A skipped token reuses what its unit gave when it was last computed, before the adaLN gate of this evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..gather import scatter_
from ..memory import PerBlock, join, rows_of
from ..parts import Extent, Kept


@dataclass(frozen=True)
class Reuse:
    needs_history = True

    def start(self) -> ReuseState:
        return ReuseState()

    def row_bytes(self, extent: Extent) -> int:
        return extent.blocks * extent.geometry.image_tokens * extent.geometry.width * extent.element_size


@dataclass(eq=False)
class ReuseState:
    """Per block the last output of every image token [rows, image tokens, width]."""

    last: PerBlock = field(default_factory=dict)

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Sequence[Tensor]) -> Tensor:
        if kept is None:
            # A view into a joint [text, image] output would keep the text alive for the whole run.
            whole = values[0].untyped_storage().nbytes() > values[0].nbytes
            self.last[block] = values[0].clone() if whole else values[0]
        else:
            for (rows, tokens), part in zip(kept.parts, values):
                scatter_(self.last[block][rows], tokens, part)
        return torch.addcmul(residual, gate, self.last[block])

    def reset(self) -> None:
        self.last.clear()

    def rows(self, part: slice) -> ReuseState:
        return ReuseState(rows_of(self.last, part))

    def joined(self, others: Sequence[ReuseState]) -> ReuseState:
        return ReuseState(join([state.last for state in (self, *others)]))
