"""Milliseconds that the record of a run costs: packing an evaluation, and what the map on the node asks for.

Masks are random, of FLUX.1-dev's 57 blocks, with cond and uncond. Packing is on the recorder's thread, beside the model;
"hand over" is what the sampling thread itself spends on the CPU. The least of several repetitions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import torch

from .. import wire
from ..recorder import Marks, Recorder, Watch
from ..trace import Evaluation, Trace
from .report import machine, table

BLOCKS, UNITS, CFG = 57, 24, (True, False)
NAMES = [f"double {index}" for index in range(19)] + [f"single {index}" for index in range(38)]
REPETITIONS = 5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--sides", type=int, nargs="+", default=(64, 128, 256), help="tokens along a side of the picture: 64 is 1024²")
    parser.add_argument("--steps", type=int, default=50)


def run(args: argparse.Namespace) -> None:
    rows = [(f"{16 * side}²", *(f"{cell:.2f}" for cell in measure(side, args.steps))) for side in args.sides]
    print(f"{machine(torch.device('cpu'))}\n{BLOCKS} blocks, {args.steps} steps, two branches; ms, and MB of the whole trace")
    print(table(("picture", "hand over", "pack", "live map", "summary", "one map", "mean of steps", "mean of all", "MB"), rows))


def measure(side: int, steps: int) -> list[float]:
    """Milliseconds of each column, and megabytes."""
    grid, random = (side, side), np.random.default_rng(0)
    mask = random.random((BLOCKS, len(CFG), side * side)) < 0.4
    units = random.random((BLOCKS, UNITS)) < 0.6

    def pack(index: int = 0) -> Evaluation:
        return Evaluation.of(index, 1.0, 0.5, mask, CFG, grid, units, units, 1.0)

    trace = Trace("run", {}, tuple(pack(index) for index in range(steps)), tuple(NAMES))
    last = steps - 1
    return [
        hand_over(torch.from_numpy(mask), grid), least(pack), least(lambda: wire.live(trace.evaluations[0], NAMES)),
        *(least(lambda: json.dumps(answer())) for answer in (
            lambda: wire.summary(trace), lambda: wire.one_map(trace, last, 30, "cond"),
            lambda: wire.one_map(trace, None, 30), lambda: wire.one_map(trace, None, None))),
        trace.nbytes / 2**20,
    ]


def hand_over(mask: torch.Tensor, grid: tuple[int, int]) -> float:
    recorder = Recorder()
    milliseconds = least(lambda: recorder.take(0, 1.0, 0.5, [Marks(mask, grid, CFG, Watch(None))]))
    recorder.finish()
    return milliseconds


def least(work: Callable[[], object]) -> float:
    """Milliseconds of the fastest repetition."""
    seconds = []
    for _ in range(REPETITIONS):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return 1000 * min(seconds)
