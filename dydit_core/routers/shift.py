"""How much of everything to compute under one threshold for all gates: tokens by the quantiles of their logits, units by theirs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..budget import solve_shift
from ..parts import Allotment, Outlook
from .token import CapacityTable, fraction_above
from .width import fraction_kept, kept, widths


def along_one_shift(outlook: Outlook, table: CapacityTable | None, units: Sequence[Tensor], last: float | None,
                    early: float = 0.0) -> tuple[Allotment, float | None]:
    """What this evaluation computes at the outlook's share, and the shift of all logits that gives it (see `solve_shift`).

    `table`: of token logits; without one, every token. `units`: logits [S, blocks, units] of heads and of channel groups at the
    outlook's sigmas, infinite for those that are always on; without them, all. `early` as of `LearnedRouter`.
    """
    sigmas, blocks = outlook.sigmas, len(outlook.costs)
    if table is None and not units:
        return Allotment(torch.ones(blocks, dtype=torch.float64)), None
    tilt, quantiles = early * (outlook.levels - 1.0)[:, None], None if table is None else table.at(sigmas)
    # In float64 like the shift: it ends next to a logit, and both comparisons must fall on the same side of it.
    units = [logits.double() for logits in units]
    ranked = [logits.sort(-1).values for logits in units]

    def profile(count: int, shift: float) -> Allotment:
        edge = -(shift + tilt[:count]).expand(-1, blocks)
        tokens = fraction_above(quantiles[:count], edge) if quantiles is not None else torch.ones(count, blocks)
        return Allotment(tokens, *(fraction_kept(logits[:count], shift) for logits in ranked))

    spans = ([] if table is None else [table.span]) + ([_span(units)] if units else [])
    low, high = min(low for low, _ in spans), max(high for _, high in spans) + early
    allotment, shift = solve_shift(profile, outlook, low, high, last)
    return replace(allotment, widths=widths(*(kept(logits[0], shift) for logits in units)) if units else None), shift


def alike(outlook: Outlook, units: tuple[int, int] | None = None, tokens: bool = True) -> Allotment:
    """An estimate where no logit is known: one fraction for all `tokens` and for both of the `units`, of which one is always on."""
    blocks = len(outlook.costs)

    def profile(count: int, fraction: float) -> Allotment:
        kept_units = () if units is None else (max(fraction, 1 / every) for every in units)
        return Allotment(torch.full((count, blocks), fraction if tokens else 1.0, dtype=torch.float64), *kept_units)

    return solve_shift(profile, outlook, 0.0, 1.0)[0]


def _span(units: Sequence[Tensor]) -> tuple[float, float]:
    """Shifts at which hardly anything and everything is computed."""
    every = torch.cat([logits.flatten() for logits in units])
    finite = every[every.isfinite()]
    return -float(finite.max()) - 1.0, -float(finite.min()) + 1.0
