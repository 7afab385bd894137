"""Layer skip: whole blocks are left out for every image token, the same at all noise levels. A control, for benchmarks.

Those that change the picture's tokens least go first; one block is skipped in part, so that the budget is met.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kept import Kept
from ..memory import Rowless
from ..parts import Allotment, Gate, Outlook, Router, Setting
from .alternate import spread_evenly


@dataclass(frozen=True)
class SkipRouter(Router):
    """`order`: all blocks, the first to be skipped first."""

    order: tuple[int, ...]

    def start(self, setting: Setting) -> SkipState:
        return SkipState(self.order)


class SkipState(Rowless):
    def __init__(self, order: tuple[int, ...]) -> None:
        self.order = order

    def keep(self, outlook: Outlook) -> Allotment:
        """Nothing is chosen in a skipped block, so `min_keep` does not hold there (see `budget.capacity`)."""
        fractions, protected = torch.ones(len(self.order), dtype=torch.float64), outlook.protected
        for block in self.order:
            before = float(outlook.cost(Allotment(fractions)))
            if before <= outlook.share:
                break
            fractions[block] = protected
            after = float(outlook.cost(Allotment(fractions)))
            if after < outlook.share:
                fractions[block] = protected + (1.0 - protected) * (outlook.share - after) / (before - after)
                break
        return Allotment(fractions)

    def scores(self, gate: Gate) -> Tensor:
        return spread_evenly(gate)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        return None
