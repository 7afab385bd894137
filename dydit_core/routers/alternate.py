"""Alternate steps: every token at some sigmas, none at others but protected ones, spread evenly (the schedule of step caches).

The last evaluation takes what is left of the budget, as a fraction of the tokens spread over the picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

import torch
from torch import Tensor

from ..kept import Kept
from ..memory import Rowless
from ..parts import Allotment, Gate, Outlook, Router, Setting

# The fractional part of multiples of the golden ratio visits any length evenly.
_CIRCLE = 1 << 24
_STRIDE = 10_368_889


@dataclass(frozen=True)
class AlternateRouter(Router):
    def start(self, setting: Setting) -> AlternateState:
        return AlternateState()


class AlternateState(Rowless):
    def keep(self, outlook: Outlook) -> Allotment:
        blocks = len(outlook.costs)
        none = float(outlook.cost(Allotment(torch.full((blocks,), outlook.protected, dtype=torch.float64))))
        least = float(outlook.cost(Allotment(torch.full((blocks,), outlook.min_keep, dtype=torch.float64))))
        ahead = len(outlook.sigmas)
        # The density of the whole window does not drift as it is worked off, so the rhythm stays even.
        evaluations = outlook.done + ahead
        mean = min(1.0, max((outlook.spent + outlook.share * ahead) / evaluations, least))
        density = (mean - none) / (1.0 - none)
        full = (mean * evaluations - outlook.spent - none * ahead) / (1.0 - none)
        if ahead == 1:
            fraction = full
        elif full < 1.0 - 1e-6:
            fraction = 0.0
        elif full > ahead - 1:
            fraction = 1.0
        else:
            fraction = float(floor(outlook.done * density) > floor((outlook.done - 1) * density))
        fraction = outlook.protected + (1.0 - outlook.protected) * min(1.0, max(0.0, fraction))
        return Allotment(torch.full((blocks,), fraction, dtype=torch.float64))

    def scores(self, gate: Gate) -> Tensor:
        return spread_evenly(gate)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        return None


def spread_evenly(gate: Gate) -> Tensor:
    """Scores [rows, image tokens] of which the highest lie evenly over the picture, however many are taken."""
    rows, tokens = gate.image.shape[:2]
    # In whole numbers: float32 would not tell far tokens apart, and Apple's devices have no float64.
    order = torch.arange(tokens, device=gate.image.device) * _STRIDE % _CIRCLE
    return order.float().expand(rows, -1)
