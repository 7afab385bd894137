"""Seconds of several ways to run one model, against what their FLOPs allow.

Every lane takes its turn at each sigma, so that a machine that slows down slows all of them. Before the clock starts, FLOPs
are counted and compared with what was booked, full capacity with the dense output, and on CUDA a forward that waits
for the device is an error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from statistics import mean, median
from typing import Protocol

import torch
from torch import Tensor

from ..blocks import Family
from ..runtime import Run
from .probe import count, no_waiting, wait
from .report import table

WARM_UP = 2
STEPS = 20


class Subject(Protocol):
    """The model that is measured, its inputs, and what its blocks cost dense."""

    device: torch.device
    family: Family
    block_flops: float

    def prepare(self, sigma: float) -> Callable[[], Tensor]:
        """The model's own forward at `sigma`, its inputs ready on the device."""
        ...

    def passing(self, run: Run, family: Family) -> AbstractContextManager[None]:
        """Within it a forward goes through `run`."""
        ...


@dataclass
class Lane:
    """One way to run the model: dense where `run` is None. `seconds` holds the measured evaluations.

    `family`: how blocks run, where it is not the subject's own. `waits`: it must wait for the device, as its router decides how much
    to compute by what it sees there.
    """

    name: str
    budget: float = 1.0
    run: Run | None = None
    seconds: list[float] = field(default_factory=list)
    family: Family | None = None
    waits: bool = False

    @property
    def unbooked(self) -> float:
        """FLOPs of an evaluation that a run does not book: mixing the experts of a TD-LoRA."""
        low_rank = self.run.method.router.low_rank if self.run is not None else None
        factors = (*low_rank.down, *low_rank.up) if low_rank is not None else ()
        return sum(2.0 * factor.numel() for factor in factors if len(factor) > 1)

    def evaluate(self, subject: Subject, forward: Callable[[], Tensor], sigma: float) -> Tensor:
        if self.run is None:
            return forward()
        self.run.arrive(sigma)
        with subject.passing(self.run, self.family or subject.family):
            return forward()


def schedule(repetitions: int) -> list[float]:
    """Sigmas of a flow that is sampled long enough for the warm-up and the evaluations that are measured."""
    steps = max(STEPS, WARM_UP + repetitions)
    return [1.0 - step / steps for step in range(steps)]


def measure(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float]) -> None:
    """Every lane in turn at each sigma; wall-clock seconds around arrival, plan, forward and recording."""
    for sigma in sigmas:
        forward = subject.prepare(sigma)
        for lane in lanes:
            wait(subject.device)
            start = time.perf_counter()
            lane.evaluate(subject, forward, sigma)
            wait(subject.device)
            lane.seconds.append(time.perf_counter() - start)


def warm_up(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float]) -> list[float]:
    """An evaluation of every lane at each sigma, dense first, and the checks that need no clock.

    Returns the FLOPs counted in each lane's last one.
    """
    first, *between, last = ((sigma, subject.prepare(sigma)) for sigma in sigmas)
    dense, counted = None, []
    for lane in lanes:
        output = lane.evaluate(subject, first[1], first[0])
        dense = output if dense is None else dense
        if lane.run is None or lane.run.method.needs_history:  # every token was computed
            _check_same(lane.name, output, dense)
        for sigma, forward in between:
            lane.evaluate(subject, forward, sigma)
        with nullcontext() if lane.waits else no_waiting(subject.device):
            counted.append(count(lambda: lane.evaluate(subject, last[1], last[0])))
    return counted


def _check_same(name: str, output: Tensor, dense: Tensor) -> None:
    if not torch.isfinite(dense).all():
        raise RuntimeError("The dense model's output is not finite; the measurement would mean nothing.")
    difference = float((output - dense).abs().max() / dense.abs().max())
    if difference > (1e-5 if dense.dtype == torch.float32 else 0.05):
        raise RuntimeError(f"{name} at full capacity differs from the model's own forward by {difference:.1e} of its largest value.")


@dataclass(frozen=True)
class Row:
    """Medians of one lane: `theory` and `speed_up` are against dense."""

    lane: Lane
    fraction: float
    seconds: float
    theory: float
    speed_up: float


def summarise(lane: Lane, spent: Sequence[float], counted: float, dense: Lane, dense_counted: float,
              block_flops: float, warm: int = WARM_UP) -> Row:
    """`spent`: fractions of dense block FLOPs that the lane booked, those of `warm` evaluations first; `counted` in the last of them."""
    outside = dense_counted - block_flops
    booked = outside + spent[warm - 1] * block_flops + lane.unbooked
    if abs(counted / booked - 1) > 0.005:
        raise RuntimeError(f"{lane.name} at {lane.budget}: {counted:.4g} FLOPs were counted, {booked:.4g} booked.")
    fraction, seconds = mean(spent[warm:]), median(lane.seconds)
    theory = dense_counted / (outside + fraction * block_flops)
    return Row(lane, fraction, seconds, theory, median(dense.seconds) / seconds)


def report(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float], repetitions: int, asked: str = "budget") -> str:
    """Check, measure, and lay out as a table; `asked` names what the lanes' numbers are."""
    return layout(timed(subject, lanes, sigmas, repetitions), asked)


def timed(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float], repetitions: int, warm: int = WARM_UP) -> list[Row]:
    """Check and measure `lanes`, dense the first, after `warm` evaluations; their runs are over then."""
    try:
        with torch.inference_mode():
            counted = warm_up(subject, lanes, sigmas[:warm])
            measure(subject, lanes, sigmas[warm:warm + repetitions])
    finally:
        close(lanes)
    rows = []
    for lane, flops in zip(lanes, counted):
        spent = lane.run.ledger.spent if lane.run else [1.0] * (warm + repetitions)
        rows.append(summarise(lane, spent, flops, lanes[0], counted[0], subject.block_flops, warm))
    return rows


def layout(rows: Sequence[Row], asked: str = "budget") -> str:
    heads = ("", asked, "block FLOPs", "seconds", "speed-up", "in theory", "achieved")
    return table(heads, [
        (row.lane.name, f"{row.lane.budget:.3g}", f"{row.fraction:.3f}", f"{row.seconds:.4g}", f"{row.speed_up:.2f}",
         f"{row.theory:.2f}", f"{row.speed_up / row.theory:.0%}")
        for row in rows
    ])


def close(lanes: Sequence[Lane]) -> None:
    for lane in lanes[1:]:
        lane.run.finish()
        lane.run.recorder.finish()
