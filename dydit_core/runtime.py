"""One sampling run under a plan: knows the protocols of `parts`, and no router, substitute or family by name.

`Run` lives from the start of sampling to its end. Each model evaluation `arrive`s with its sigma; each forward of the
model inside it is a `ForwardPass`, during which the blocks' `.forward` are swapped (`swapped`).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from .blocks import Backend, Family, Pass
from .budget import Ledger, Plan, capacity, share_between
from .kept import Kept
from .layouts import Layouts
from .parts import (FULL_WIDTH, Allotment, BlockCost, Extent, Gate, Geometry, Level, Lines, LowRank, Router, Setting,
                    Substitute, Weights, Width, unchanged)
from .recorder import Marks, Recorder, Watch
from .regions import Regions, Zones
from .streams import Keys, Stream, Streams


@dataclass(frozen=True)
class Method:
    """Who decides and what stands in."""

    router: Router
    substitute: Substitute

    @property
    def needs_history(self) -> bool:
        """The first evaluation must compute every token."""
        return self.router.needs_history or self.substitute.needs_history

    def row_bytes(self, extent: Extent) -> int:
        """Bytes that a run holds for each of its batch rows."""
        return self.router.row_bytes(extent) + self.substitute.row_bytes(extent)

    def run_bytes(self, extent: Extent) -> int:
        """Bytes that a run holds once."""
        return self.router.run_bytes(extent)


@dataclass(frozen=True)
class Branches:
    """Batch rows of one forward by branch: which are cond.

    `keys`, each stable over the run, name equally many rows each, in row order.
    """

    keys: Keys
    cond: slice
    uncond: slice

    @staticmethod
    def cond_only(rows: int) -> Branches:
        return Branches(("cond",), slice(0, rows), slice(rows, rows))

    @property
    def rows(self) -> tuple[int, int]:
        """Rows of cond and of uncond."""
        return self.cond.stop - self.cond.start, self.uncond.stop - self.uncond.start

    @property
    def is_cond(self) -> tuple[bool, ...]:
        """Of each row."""
        return tuple(self.cond.start <= row < self.cond.stop for row in range(sum(self.rows)))

    def parts(self) -> list[slice]:
        """Non-empty slices in row order."""
        return sorted((part for part in (self.cond, self.uncond) if part.stop > part.start), key=lambda part: part.start)


class Run:
    """State of one sampling run; dropped when sampling ends, also after an interrupt."""

    def __init__(self, plan: Plan, method: Method, schedule: Sequence[float], recorder: Recorder | None = None,
                 regions: Regions = Regions()) -> None:
        self.plan, self.method, self.recorder, self.regions = plan, method, recorder, regions
        self.ledger = Ledger(plan, [float(sigma) for sigma in schedule if sigma > 0])
        self.sigma = float("inf")
        self.index = -1
        self._streams = Streams()
        self.layouts = Layouts()
        self.mixture = method.router.low_rank.start() if method.router.low_rank is not None else None
        self._spent: list[tuple[float, float]] = []
        self.picture: tuple[int, ...] | None = None  # token grid that the regions lie on; None: that of every forward
        self._zones: dict[tuple[tuple[int, ...], int], Zones] = {}
        self._marks: list[Marks] = []
        # Cond and uncond rows of the evaluation before and, so far, of this one: its passes may hold one branch each.
        self.rows_before, self._rows = (0, 0), (0, 0)

    def arrive(self, sigma: float) -> None:
        """A model evaluation begins.

        A sigma that rises again (restart samplers) makes history worthless; one step back is what heunpp2 does at each step.
        """
        self._settle()
        if self.ledger.position(self.sigma) - self.ledger.position(sigma) > 1:
            self._streams.reset()
        self.sigma, self.index = sigma, self.index + 1
        self.rows_before, self._rows = self._rows, (0, 0)
        self.ledger.arrive(sigma)

    def finish(self) -> None:
        """Book the last evaluation and forget all history."""
        self._settle()
        self._streams.clear()

    @property
    def idle(self) -> bool:
        """No token can be skipped at this sigma or later, so the model may run untouched."""
        inside = self.plan.inside(self.sigma)
        return not inside and (not self.method.needs_history or self.sigma < self.plan.end_sigma)

    def open(self, costs: Sequence[BlockCost], geometry: Geometry, branches: Branches, rows: int,
             grid: tuple[int, ...], added: Sequence[BlockCost] = (),
             time_embedding: Callable[[Tensor, torch.dtype], Tensor] | None = None,
             level: Level = unchanged) -> ForwardPass:
        """The pass for one forward; `rows` batch rows, `grid` token rows and columns of the picture, before which a video has its frames.

        `added`: costs of the method's low-rank additions; `level`, `time_embedding` as of `blocks.Family`.
        """
        self._rows = self._rows[0] + branches.rows[0], self._rows[1] + branches.rows[1]
        setting = Setting(self.ledger.schedule, time_embedding)
        stream = self._streams.of(branches.keys, rows // len(branches.keys), geometry.image_tokens,
                                  lambda: Stream(self.method.router.start(setting), self.method.substitute.start()))
        inside = self.plan.inside(self.sigma)
        allotment = Allotment(torch.ones(len(costs)))
        if inside and not (self.method.needs_history and not stream.seen):
            protected = self.zones(grid, geometry.image_tokens).least / geometry.image_tokens
            outlook = self.ledger.outlook(self.sigma, costs, geometry.image_tokens, added, protected, level)
            overhead = self.overhead(costs, geometry)
            allotment = stream.router.keep(replace(outlook, share=outlook.share - overhead))
        executed = [cost + more for cost, more in zip(costs, added)] if added and inside else costs
        mixed = partial(self.mixture.at, float(level(torch.tensor(self.sigma)))) if self.mixture is not None and inside else None
        return ForwardPass(self, stream, costs, executed, geometry, branches, rows, grid, allotment, mixed)

    def zones(self, grid: tuple[int, ...], image_tokens: int) -> Zones:
        """What the artist marked, on the token `grid`; nothing where it is not the picture's.

        A prompt for an area runs on a part of the picture, and which one it is not told.
        """
        if (grid, image_tokens) not in self._zones:
            here = self.regions and self.picture in (None, grid)
            self._zones[grid, image_tokens] = self.regions.on(grid, image_tokens) if here else Zones()
        return self._zones[grid, image_tokens]

    def watch(self) -> Watch:
        """Begins to measure a forward."""
        return Watch(self.recorder.device if self.recorder is not None else None)

    def book(self, executed: float, dense: float, marks: Marks | None) -> None:
        """FLOPs of one forward, executed and dense, and what it computed."""
        self._spent.append((executed, dense))
        if marks is not None:
            marks.watch.stop()
            self._marks.append(marks)

    def book_dense(self, costs: Sequence[BlockCost], geometry: Geometry, branches: Branches, rows: int, grid: tuple[int, ...],
                   watch: Watch) -> None:
        """A forward ran untouched."""
        dense = rows * sum(cost.at(geometry.image_tokens) for cost in costs)
        every = torch.ones((), dtype=torch.bool, device="cpu").expand(len(costs), rows, geometry.image_tokens)
        self.book(dense, dense, Marks(every, grid, branches.is_cond, watch))

    def overhead(self, costs: Sequence[BlockCost], geometry: Geometry) -> float:
        """Cost of the router's decisions in one evaluation, as a fraction of dense."""
        dense = sum(cost.at(geometry.image_tokens) for cost in costs)
        return len(costs) * self.method.router.flops(geometry) / dense

    def _settle(self) -> None:
        if not self._spent:
            return
        fraction = sum(done for done, _ in self._spent) / sum(dense for _, dense in self._spent)
        self.ledger.book(fraction)
        if self.recorder is not None and self._marks:
            self.recorder.take(self.index, self.sigma, fraction, self._marks, self.method.router.units)
        self._spent, self._marks = [], []


class ForwardPass:
    """One forward of the model: answers the family's `select` and `update` (see `blocks.Pass`)."""

    def __init__(self, run: Run, stream: Stream, dense: Sequence[BlockCost], costs: Sequence[BlockCost], geometry: Geometry,
                 branches: Branches, rows: int, grid: tuple[int, ...], allotment: Allotment,
                 mixed: Callable[[int, str, Tensor], LowRank | None] | None) -> None:
        self.run, self.stream, self.dense, self.costs, self.geometry, self.rows = run, stream, dense, costs, geometry, rows
        self.text_tokens, self.sigma = geometry.text_tokens, run.sigma
        self.executed = 0.0
        self._widths = allotment.widths
        self._zones = run.zones(grid, geometry.image_tokens)
        least = max(run.plan.min_keep, self._zones.least / geometry.image_tokens)
        self._capacities = None if allotment.tokens is None else [
            capacity(float(part), geometry.image_tokens, least, self._zones.least) for part in allotment.tokens]
        self._branches, self._grid, self._mixed = branches, grid, mixed
        self._mask: Tensor | None = None
        self._watch = run.watch()

    def select(self, gate: Gate) -> Kept | None:
        block, tokens = gate.block, gate.image.shape[1]
        if tokens != self.geometry.image_tokens:
            raise ValueError(
                f"DyDiT Budget: the model runs on {tokens} image tokens where {self.geometry.image_tokens} were expected; "
                "another node adds or removes tokens. Take that node out, or set the budget to 1.0."
            )
        # Another node may have replaced this block in earlier evaluations: then it starts as every block does.
        new = self.run.method.needs_history and block not in self.stream.seen
        kept = None
        if not new and (self._capacities is None or self._capacities[block] < tokens):
            kept = self._decide(gate)
        elif self.run.method.router.measures:
            self._scores(gate)
        self.stream.router.computed(gate, kept)
        self._book(block, kept)
        self._mark(block, kept, gate.image)
        self.stream.seen.add(block)
        return kept

    def _decide(self, gate: Gate) -> Kept | None:
        scores = self._zones.order(self._scores(gate), by_threshold=self._capacities is None)
        if self._capacities is None:
            return Kept.above(scores, 0.0)
        return Kept.best(scores, self._per_row(self._capacities[gate.block], gate.image.shape[1]))

    def _scores(self, gate: Gate) -> Tensor:
        self.executed += self.rows * self.run.method.router.flops(self.geometry)
        return self.stream.router.scores(gate)

    def _book(self, block: int, kept: Kept | None) -> None:
        """Count what the block executes."""
        tokens = self.geometry.image_tokens if kept is None else kept.count / self.rows
        self.executed += self.rows * self.costs[block].at(tokens, *self.width(block).fractions)

    def width(self, block: int) -> Width:
        return FULL_WIDTH if self._widths is None else self._widths[block]

    def low_rank(self, block: int, layer: str, x: Tensor) -> LowRank | None:
        return None if self._mixed is None else self._mixed(block, layer, x)

    def cut(self, key: Hashable, weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines) -> Weights:
        return self.run.layouts.cut(key, weight, bias, rows, columns)

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        return self.stream.substitute.update(block, residual, gate, kept, values)

    def close(self) -> None:
        """The forward went through: book it."""
        dense = self.rows * sum(cost.at(self.geometry.image_tokens) for cost in self.dense)
        marks = None if self._mask is None else Marks(self._mask, self._grid, self._branches.is_cond, self._watch, self._widths)
        self.run.book(self.executed, dense, marks)

    def _per_row(self, kept: int, tokens: int) -> list[tuple[slice, int]]:
        """Row slices and the tokens each of their rows keeps: one slice for all rows where they keep the same."""
        rows = self._branches.rows if all(self._branches.rows) else self.run.rows_before
        k_cond, k_uncond = share_between(kept, tokens, *rows, self.run.plan.branch_share, self._zones.least)
        if k_cond == k_uncond:
            return [(slice(0, self.rows), kept)]
        return [(part, k_cond if part is self._branches.cond else k_uncond) for part in self._branches.parts()]

    def _mark(self, block: int, kept: Kept | None, like: Tensor) -> None:
        if self.run.recorder is None:
            return
        if self._mask is None:
            shape = (len(self.costs), self.rows, like.shape[1])
            self._mask = torch.zeros(shape, dtype=torch.bool, device=like.device)
        if kept is None:
            self._mask[block] = True
        else:
            kept.fill_(self._mask[block], True)


_current: ContextVar[tuple[Family, Pass, Backend]] = ContextVar("dydit_pass")
_stand_ins: WeakKeyDictionary[nn.Module, Callable] = WeakKeyDictionary()


def _stand_in(block: nn.Module, index: int) -> Callable:
    """The function that takes the place of `block.forward`: always the same one, as compiled graphs guard on it."""
    if block not in _stand_ins:
        weak = ref(block)

        @torch.compiler.disable
        def forward(*args: Any, **kwargs: Any) -> Any:
            family, current, backend = _current.get()
            return family.forward(weak(), index, current, backend, *args, **kwargs)

        _stand_ins[block] = forward
    return _stand_ins[block]


@contextmanager
def swapped(blocks: Sequence[nn.Module], family: Family, current: Pass, backend: Backend) -> Iterator[None]:
    """Let `family` run the blocks under `current`; their `.forward` comes back whatever happens."""
    before = [block.__dict__.get("forward") for block in blocks]
    token = _current.set((family, current, backend))
    try:
        for index, block in enumerate(blocks):
            block.forward = _stand_in(block, index)
        yield
    finally:
        _current.reset(token)
        for block, forward in zip(blocks, before):
            if forward is None:
                block.__dict__.pop("forward", None)
            else:
                block.forward = forward


@contextmanager
def running(run: Run, family: Family, model: nn.Module, geometry: Geometry, branches: Branches, rows: int,
            grid: tuple[int, ...], backend: Backend) -> Iterator[None]:
    """One forward of `model` under `run`: call the model as usual inside this context."""
    blocks, costs = family.blocks(model), family.costs(model, geometry, backend)
    if run.idle:
        watch = run.watch()
        yield
        run.book_dense(costs, geometry, branches, rows, grid, watch)
        return
    added = family.added_costs(model, geometry, run.method.router.low_rank)
    current = run.open(costs, geometry, branches, rows, grid, added, partial(family.time_embedding, model, backend), partial(family.level, model))
    with swapped(blocks, family, current, backend):
        yield
    current.close()
