"""Seconds per model evaluation of DyDiT-XL/2, against the same model dense, at several batch sizes.

Dense (the model's own forward, nothing of ours around it), the published forward, which computes everything and masks it, ours
at the routers' own threshold, where pictures of a batch keep different numbers of tokens, and ours at a budget, where they
keep equally many, take turns, one evaluation each. Medians; "in theory" is the speed-up that the executed FLOPs of those same
evaluations allow. FLOPs are counted before timing and must be those booked, so a token that is padding would show.
Evaluations are from the middle of 50 steps. Weights are random: they set no pace.

The routers decide as a table says, about 0.49 of the block FLOPs, which is what the authors' λ = 0.5 executes; `--like FILE`
takes the table from what the routers of a trained DyDiT decide while it samples.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..budget import Plan
from ..checkpoints.files import FileError
from ..layouts import LIMIT_BYTES
from ..models.dit import DiTConfig
from ..recorder import Recorder
from ..routers.dit import DiTRouters
from ..runtime import Method, Run
from ..sampling import eps_sigmas
from ..substitutes.nothing import Nothing
from .dit_routers import HALF, rates_of, routers_like
from .dit_subject import DiTSubject
from .published_dit import MaskingFamily
from .report import machine, table
from .timing import Lane, Row, timed

# The first measures what tokens score, the second decides the widths of all steps.
STEPS, WARM_UP = 50, 3
XL = DiTConfig()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu: full width, few blocks; cuda: the whole model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--batch", type=_positive, nargs="+", default=(1, 8, 32), metavar="ROWS")
    parser.add_argument("--blocks", type=_positive, help=f"how many of the {XL.depth} blocks run; default: {XL.depth // 4} on CPU, all elsewhere")
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.5,))
    parser.add_argument("--like", type=Path, metavar="FILE", help="a DyDiT whose routers' rates are taken, as .safetensors or .pt")
    parser.add_argument("--repetitions", type=_positive, default=5, help="evaluations measured per row")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    cpu = device.type == "cpu"
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench dit: there is no CUDA device here; leave --device out to measure on the CPU.")
    if args.repetitions + WARM_UP > STEPS // 2:
        raise SystemExit(f"bench dit: half of {STEPS} steps are {STEPS // 2} evaluations; ask for at most {STEPS // 2 - WARM_UP} --repetitions.")
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    config = replace(XL, depth=args.blocks or (XL.depth // 4 if cpu else XL.depth))
    try:
        rates = HALF if args.like is None else rates_of(args.like)
    except FileError as error:
        raise SystemExit(f"bench dit: {error}") from None
    first = DiTSubject(config, 8, device, dtype)
    routers = routers_like(rates, first, eps_sigmas(STEPS)[:-1])
    print(f"{machine(device)}\n{XL.title}, {config.depth} of {XL.depth} blocks, {XL.tokens} tokens, {str(dtype)[6:]}\n{rates}")
    rows = []
    for batch in args.batch:
        print(f"batch {batch} …", file=sys.stderr, flush=True)
        subject = DiTSubject(config, batch, device, dtype, first.model)
        rows += [(batch, row) for row in bench(subject, routers, args.budgets, args.repetitions)]
    print(layout(rows), flush=True)


def bench(subject: DiTSubject, routers: DiTRouters, budgets: Sequence[float], repetitions: int) -> list[Row]:
    steps = eps_sigmas(STEPS)[:-1]
    return timed(subject, open_lanes(subject, routers, budgets, steps), steps[STEPS // 2:], repetitions, WARM_UP)


def open_lanes(subject: DiTSubject, routers: DiTRouters, budgets: Sequence[float], sigmas: Sequence[float]) -> list[Lane]:
    """Where a part of the blocks runs, cut weights are held in as large a part of the room that the whole model would have."""
    def begun(router: DiTRouters, budget: float) -> Run:
        run = Run(Plan(budget), Method(router, Nothing()), sigmas, Recorder())
        run.layouts.limit = LIMIT_BYTES * subject.config.depth // XL.depth
        return run

    own = routers.by_threshold()
    return [Lane("dense"), Lane("as published: masks", 0.0, begun(own, 0.0), family=MaskingFamily(), waits=True),
            Lane("ours, own threshold", 0.0, begun(own, 0.0), waits=True),
            *(Lane(f"ours, budget {budget:g}", budget, begun(routers, budget)) for budget in budgets)]


def layout(rows: Sequence[tuple[int, Row]]) -> str:
    heads = ("", "batch", "tokens kept", "block FLOPs", "seconds", "each picture", "speed-up", "in theory", "achieved")
    return table(heads, [
        (row.lane.name, str(batch), _tokens(row), f"{row.fraction:.3f}", f"{row.seconds:.4g}", f"{row.seconds / batch:.4g}",
         f"{row.speed_up:.2f}", f"{row.theory:.2f}", f"{row.speed_up / row.theory:.0%}")
        for batch, row in rows
    ])


def _tokens(row: Row) -> str:
    """What the picture that keeps least and the one that keeps most keep in a block: means over the blocks and evaluations measured."""
    if row.lane.run is None:
        return "all"
    kept = np.stack([one.mask().sum(2) for one in row.lane.run.recorder.evaluations[WARM_UP:]])
    least, most = (f"{extreme(kept, axis=2).mean():.0f}" for extreme in (np.min, np.max))
    return least if least == most else f"{least}–{most}"
