"""Budget to plan: how much of each evaluation may be spent so that the whole run meets what was asked.

Budget = FLOPs executed in the blocks ÷ the same blocks dense, averaged over all evaluations of a run. Everything is a
function of sigma: the number of evaluations a sampler makes at each sigma is learnt as they come, so Euler, Heun and
SDE samplers end at the same mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

import torch
from torch import Tensor

from .parts import Allotment, BlockCost, Level, Outlook, Router, Setting, unchanged

_TILE, _TILE_FROM = 64, 1024
_HALVINGS, _STILL_MET = 24, 0.002


@dataclass(frozen=True)
class Plan:
    """What the artist asked for. Between `start_sigma` and `end_sigma` tokens may be skipped; outside, none are.

    `branch_share`: tokens of cond ÷ tokens of uncond. `min_keep`: least fraction of image tokens kept.
    """

    budget: float
    start_sigma: float = float("inf")
    end_sigma: float = 0.0
    min_keep: float = 0.10
    branch_share: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.budget <= 1.0:
            raise ValueError(f"The compute budget is {self.budget}; it must be between 0 and 1 (0.5 = half the FLOPs).")
        if not 0.0 <= self.min_keep <= 1.0:
            raise ValueError(f"min_keep is {self.min_keep}; it must be between 0 and 1 (0.1 = one token in ten).")
        if not 0.1 <= self.branch_share <= 10.0:
            raise ValueError(f"branch_share is {self.branch_share}; it must be between 0.1 and 10 (1 = cond and uncond alike).")

    def inside(self, sigma: float) -> bool:
        return self.end_sigma <= sigma <= self.start_sigma


@dataclass
class Ledger:
    """Books what each evaluation spent and says what the present one may spend.

    `schedule`: the sigmas of the run, falling, without the final zero. Where between two of them a sampler evaluates
    (Heun twice at the lower one, midpoint methods once on the way) is learnt from the interval before: as fractions of
    the way down, `_before` there and so far `_here`.
    """

    plan: Plan
    schedule: Sequence[float]
    spent: list[float] = field(default_factory=list)
    _spent_inside: list[float] = field(default_factory=list)
    _sigma: float = float("inf")
    _position: int = -1
    _before: list[float] = field(default_factory=lambda: [1.0])
    _here: list[float] = field(default_factory=list)

    def arrive(self, sigma: float) -> None:
        """A new evaluation begins at `sigma`."""
        self._sigma = sigma
        position = self.position(sigma)
        if position != self._position:
            self._before = self._here if self._position > 0 else self._before
            self._position, self._here = position, []
        above, below = self._interval(position)
        self._here.append((above - sigma) / (above - below) if above > below else 1.0)

    def ahead(self, sigma: float) -> list[float]:
        """Sigmas of the evaluations still to come, the present one first."""
        here = self._here if self._position > 0 else []
        pattern = max(self._before, here, key=len)
        # Whatever happens on the way, a step of the schedule is evaluated itself.
        rest = (pattern[len(here):] or ([1.0] if here[-1] < 0.999 else [])) if here else []
        later = [self._within(position, pattern) for position in range(self._position + 1, len(self.schedule))]
        return [sigma, *self._within(self._position, rest), *(step for steps in later for step in steps)]

    def position(self, sigma: float) -> int:
        """Steps of the schedule that lie above `sigma`; SDE samplers begin a ten-thousandth below the first."""
        return sum(1 for step in self.schedule if step > sigma * (1 + 2e-4))

    def _interval(self, position: int) -> tuple[float, float]:
        """The sigmas of the schedule between which the evaluations at `position` lie, the lower one included."""
        steps = [*self.schedule, 0.0]
        return steps[max(0, position - 1)], steps[position]

    def _within(self, position: int, fractions: Sequence[float]) -> list[float]:
        above, below = self._interval(position)
        return [below + (1.0 - fraction) * (above - below) for fraction in fractions]

    def outlook(self, sigma: float, costs: Sequence[BlockCost], image_tokens: int, added: Sequence[BlockCost] = (),
                protected: float = 0.0, level: Level = unchanged) -> Outlook:
        """What a router may spend on the evaluations still to come inside the window."""
        ahead = self.ahead(sigma)
        inside = [step for step in ahead if self.plan.inside(step)]
        total = self.plan.budget * (len(self.spent) + len(ahead))
        left = total - sum(self.spent) - (len(ahead) - len(inside))
        return Outlook(
            sigmas=torch.tensor(inside, dtype=torch.float64),
            share=left / max(1, len(inside)),
            done=len(self._spent_inside),
            spent=sum(self._spent_inside),
            min_keep=max(self.plan.min_keep, protected),
            costs=costs,
            image_tokens=image_tokens,
            added=added,
            protected=protected,
            level=level,
        )

    def book(self, fraction: float) -> None:
        """The present evaluation spent `fraction` of its dense FLOPs."""
        self.spent.append(fraction)
        if self.plan.inside(self._sigma):
            self._spent_inside.append(fraction)

    @property
    def achieved(self) -> float:
        """Mean fraction spent so far (1.0 before the first evaluation)."""
        return sum(self.spent) / len(self.spent) if self.spent else 1.0


def solve_shift(profile: Callable[[int, float], Allotment], outlook: Outlook, low: float, high: float,
                last: float | None = None) -> tuple[Allotment, float]:
    """What this evaluation computes under the one shift that meets the outlook's share, and that shift.

    `profile(count, shift)` gives an allotment [count, blocks] for the first `count` of the outlook's sigmas; it rises
    with the shift between `low` and `high`. `last`, the shift of the evaluation before, stays while it still meets the
    share: widths then follow the noise level alone, and their weights are cut anew only where that asks for it.
    """
    def floored(count: int, shift: float) -> Allotment:
        allotment = profile(count, shift)
        return replace(allotment, tokens=allotment.tokens.clamp(outlook.min_keep, 1.0))

    def excess(shift: float) -> float:
        return float(outlook.cost(floored(len(outlook.sigmas), shift)).mean()) - outlook.share

    if last is None or abs(excess(last)) > _STILL_MET * outlook.share:
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if excess(middle) > 0 else (middle, high)
        last = low
    now = floored(1, last)
    return Allotment(*(part[0] if isinstance(part, Tensor) else part for part in (now.tokens, now.heads, now.groups))), last


def capacity(keep: float, tokens: int, min_keep: float, protected: int = 0) -> int:
    """Tokens computed for a kept fraction: on tile edges where there are many, never below the floor.

    Where no more than the protected tokens are asked for, nothing is chosen, and the floor of a choice does not hold.
    """
    if keep >= 1.0 - 1e-9:
        return tokens
    tile = _TILE if tokens >= _TILE_FROM else 1
    floor = min_keep * tokens if keep * tokens > protected + 1e-6 else 0.0
    least = ceil(max(floor, protected) / tile - 1e-9)
    return min(tokens, max(round(keep * tokens / tile), least) * tile)


def share_between(kept: int, tokens: int, cond_rows: int, uncond_rows: int, branch_share: float, protected: int = 0) -> tuple[int, int]:
    """Tokens kept per cond row and per uncond row: `branch_share` : 1, their mean over rows staying `kept`."""
    if not cond_rows or not uncond_rows or kept in (0, tokens) or branch_share == 1.0:
        return kept, kept
    total = kept * (cond_rows + uncond_rows)
    uncond = total / (cond_rows * branch_share + uncond_rows)
    cond = min(tokens, max(protected, round(uncond * branch_share)))
    uncond = min(tokens, max(protected, round((total - cond * cond_rows) / uncond_rows)))
    return min(tokens, max(protected, round((total - uncond * uncond_rows) / cond_rows))), uncond


def forecast(plan: Plan, router: Router, schedule: Sequence[float], costs: Sequence[BlockCost], image_tokens: int,
             dense_first: bool, overhead: float = 0.0, added: Sequence[BlockCost] = (), protected: int = 0, level: Level = unchanged) -> float | None:
    """Budget that a run over `schedule` will reach, without running it (one evaluation per sigma).

    `overhead`: cost of the router's own decisions as a fraction of dense; `added`: costs of low-rank additions;
    `protected`: tokens that are computed in any case; `level` as of `blocks.Family`. None for a router that does not follow the budget.
    """
    ledger, state = Ledger(plan, schedule), router.start(Setting(schedule))
    for sigma in schedule:
        ledger.arrive(sigma)
        if not plan.inside(sigma) or (dense_first and not ledger.spent):
            ledger.book(1.0)
            continue
        outlook = ledger.outlook(sigma, costs, image_tokens, added, protected / image_tokens, level)
        allotment = state.keep(replace(outlook, share=outlook.share - overhead))
        if allotment.tokens is None:
            return None
        tokens = [capacity(float(part), image_tokens, outlook.min_keep, protected) / image_tokens for part in allotment.tokens]
        whole = replace(allotment, tokens=torch.tensor(tokens, dtype=torch.float64))
        ledger.book(float(outlook.cost(whole)) + overhead)
    return ledger.achieved
