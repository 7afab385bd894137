"""Seconds per model evaluation of FLUX under a budget, against the same model dense.

Dense (the model's own forward, nothing of ours around it) and every budget take turns, one evaluation each, so that a
machine that slows down slows all of them. Medians of the evaluations after the first two: what a budget costs once
its history exists. "in theory" is the speed-up that the executed FLOPs of those same evaluations allow. Every forward
is timed with the plan, the router and the recording of the map; before timing, FLOPs are counted and compared with
what was booked, full capacity is compared with the dense output, and on CUDA a forward that waits for the device is
an error. Weights are random: they set no pace. Where only some blocks of a model run, cut weights are held in as large
a part of the room that the whole model would have. Between two measured evaluations the heads of a quarter (budget
0.9) to half (0.5) of the blocks change, and as many channel groups.

`--keep official` compares with the published DyFLUX forward at the fraction of tokens that its published FLOPs imply.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import torch
from torch import Tensor

from ..budget import Plan
from ..models.flux import FluxConfig
from ..recorder import Recorder
from ..runtime import Method, Run
from ..substitutes.nothing import Nothing
from .lanes import NAMES, Lane, close, open_lanes, token_scores
from .published import DENSE, OFFICIAL_KEEP, OURS, PUBLISHED, EvenRouter, PublishedFamily, whole_model
from .report import machine, table
from .subject import ARCHITECTURES, Subject, count, for_cpu, no_waiting, wait

WARM_UP = 2
STEPS = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu",
                        help="cpu: full width, few blocks; cuda: the whole model (dev: about 42 GB, less with fewer --methods)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="default: dev, or lite with --keep")
    parser.add_argument("--methods", choices=NAMES, nargs="+", default=tuple(NAMES), help="default: all")
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.9, 0.75, 0.5))
    parser.add_argument("--keep", type=_fraction, metavar="official|FRACTION",
                        help="instead of budgets: dense, the published forward and ours, at this fraction of image tokens")
    parser.add_argument("--repetitions", type=int, default=5, help="evaluations measured per row")
    parser.add_argument("--quick", action="store_true", help="three repetitions at the lowest budget")


def _fraction(text: str) -> float:
    try:
        fraction = OFFICIAL_KEEP if text == "official" else float(text)
    except ValueError:
        fraction = 0.0
    if not 0.0 < fraction <= 1.0:
        raise argparse.ArgumentTypeError(f'{text} is neither "official" nor a fraction above 0, up to 1')
    return fraction


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    cpu = device.type == "cpu"
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench flux: there is no CUDA device here; leave --device out to measure on the CPU.")
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    budgets, repetitions = ([min(args.budgets)], 3) if args.quick else (args.budgets, args.repetitions)
    config = ARCHITECTURES[args.arch or ("dev" if args.keep is None else "lite")]
    side, text = 32 if cpu else 64, 256
    if args.keep is not None:
        text = side * side // 8  # as in the published figure
        print(f"The whole model, by arithmetic:\n{arithmetic(config, args.keep)}\n")
    subject = Subject(for_cpu(config) if cpu else config, side, text, device, dtype)
    print(f"{machine(device)}\n{subject}")
    steps = schedule(repetitions)
    if args.keep is not None:
        lanes = keep_lanes(subject, args.keep, steps)
    else:
        lanes = open_lanes(subject, args.methods, budgets, steps, config.depth + config.depth_single_blocks)
    print(report(subject, lanes, steps, repetitions, "budget" if args.keep is None else "kept"), flush=True)


def schedule(repetitions: int) -> list[float]:
    """Sigmas of a run that is long enough for the warm-up and the evaluations that are measured."""
    steps = max(STEPS, WARM_UP + repetitions)
    return [1.0 - step / steps for step in range(steps)]


def arithmetic(config: FluxConfig, keep: float) -> str:
    """MACs of the whole model with 4,096 image and 512 text tokens."""
    macs = whole_model(config, keep)
    return table(("", "kept", "T MACs", "in theory"), [
        (name, f"{1.0 if name == DENSE else keep:.3f}", f"{value / 1e12:.1f}", f"{macs[DENSE] / value:.2f}")
        for name, value in macs.items()
    ])


def keep_lanes(subject: Subject, keep: float, sigmas: Sequence[float]) -> list[Lane]:
    """Dense, the published forward and ours, which keep the same tokens."""
    method = Method(EvenRouter(token_scores(subject), fraction=keep), Nothing())

    def lane(name: str, **more: PublishedFamily) -> Lane:
        return Lane(name, keep, Run(Plan(0.0), method, sigmas, Recorder()), **more)

    return [Lane(DENSE), lane(PUBLISHED, family=PublishedFamily()), lane(OURS)]


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
    """Two evaluations of every lane, dense first, and the checks that need no clock.

    Returns the FLOPs counted in each lane's second one.
    """
    first, second = (subject.prepare(sigma) for sigma in sigmas)
    dense, counted = None, []
    for lane in lanes:
        output = lane.evaluate(subject, first, sigmas[0])
        dense = output if dense is None else dense
        if lane.run is None or lane.run.method.needs_history:  # every token was computed
            _check_same(lane.name, output, dense)
        with no_waiting(subject.device):
            counted.append(count(lambda: lane.evaluate(subject, second, sigmas[1])))
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
              block_flops: float) -> Row:
    """`spent`: fractions of dense block FLOPs that the lane booked, the warm-up's first; `counted` in the warm-up's last."""
    outside = dense_counted - block_flops
    booked = outside + spent[WARM_UP - 1] * block_flops + lane.unbooked
    if abs(counted / booked - 1) > 0.005:
        raise RuntimeError(f"{lane.name} at {lane.budget}: {counted:.4g} FLOPs were counted, {booked:.4g} booked.")
    fraction, seconds = mean(spent[WARM_UP:]), median(lane.seconds)
    theory = dense_counted / (outside + fraction * block_flops)
    return Row(lane, fraction, seconds, theory, median(dense.seconds) / seconds)


def report(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float], repetitions: int, asked: str = "budget") -> str:
    """Check, measure, and lay out as a table; `asked` names what the lanes' numbers are."""
    try:
        with torch.inference_mode():
            counted = warm_up(subject, lanes, sigmas[:WARM_UP])
            measure(subject, lanes, sigmas[WARM_UP:WARM_UP + repetitions])
    finally:
        close(lanes)
    rows = []
    for lane, flops in zip(lanes, counted):
        spent = lane.run.ledger.spent if lane.run else [1.0] * (WARM_UP + repetitions)
        rows.append(summarise(lane, spent, flops, lanes[0], counted[0], subject.block_flops))
    return layout(rows, asked)


def layout(rows: Sequence[Row], asked: str = "budget") -> str:
    heads = ("", asked, "block FLOPs", "seconds", "speed-up", "in theory", "achieved")
    return table(heads, [
        (row.lane.name, f"{row.lane.budget:.3g}", f"{row.fraction:.3f}", f"{row.seconds:.4g}", f"{row.speed_up:.2f}",
         f"{row.theory:.2f}", f"{row.speed_up / row.theory:.0%}")
        for row in rows
    ])
