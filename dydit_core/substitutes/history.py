"""A skipped token reuses what its unit gave when it was last computed, before the adaLN gate of this evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kept import Kept
from ..memory import PerBlock, join, rows_of
from ..parts import Extent


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

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        if kept is None:
            # A view into a joint [text, image] output would keep the text alive for the whole run.
            whole = values.untyped_storage().nbytes() > values.nbytes
            self.last[block] = values.clone(memory_format=torch.contiguous_format) if whole else values.contiguous()
        else:
            kept.put_(self.last[block], values)
        return torch.addcmul(residual, gate, self.last[block])

    def reset(self) -> None:
        self.last.clear()

    def rows(self, part: slice) -> ReuseState:
        return ReuseState(rows_of(self.last, part))

    def joined(self, others: Sequence[ReuseState]) -> ReuseState:
        return ReuseState(join([state.last for state in (self, *others)]))
