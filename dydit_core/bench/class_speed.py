"""Seconds of a class-conditional model with a published router, against the same model dense: what `bench dit` and `bench latte` run.

Weights are random: they set no pace.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..budget import Plan
from ..checkpoints.files import FileError
from ..layouts import LIMIT_BYTES
from ..models.dit import DiTConfig
from ..models.latte import LatteConfig
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
# Synthetic routers are fitted to what about so many tokens score.
_FITTED = 2048


@dataclass(frozen=True)
class Bench:
    """A command: `whole` is the model it is about, of which `few` blocks run on a CPU, on each of `batches`; `thing` is what it draws."""

    command: str
    whole: DiTConfig
    few: int
    batches: tuple[int, ...]
    thing: str

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--device", default="cpu", help="cpu: full width, few blocks; cuda: the whole model")
        parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
        parser.add_argument("--batch", type=_positive, nargs="+", default=self.batches, metavar="ROWS")
        parser.add_argument("--blocks", type=_positive, help=f"how many of the {self.whole.depth} blocks run; default: {self.few} on CPU, all elsewhere")
        parser.add_argument("--budgets", type=float, nargs="+", default=(0.5,))
        parser.add_argument("--like", type=Path, metavar="FILE", help="a DyDiT whose routers' rates are taken, as .safetensors or .pt")
        parser.add_argument("--repetitions", type=_positive, default=5, help="evaluations measured per row")

    def run(self, args: argparse.Namespace) -> None:
        device = torch.device(args.device)
        cpu = device.type == "cpu"
        config = replace(self.whole, depth=args.blocks or (self.few if cpu else self.whole.depth))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise SystemExit(f"{self.command}: there is no CUDA device here; leave --device out to measure on the CPU.")
        if args.repetitions + WARM_UP > STEPS // 2:
            raise SystemExit(f"{self.command}: half of {STEPS} steps are {STEPS // 2} evaluations; ask for at most {STEPS // 2 - WARM_UP} --repetitions.")
        if isinstance(config, LatteConfig) and config.depth % 2:
            raise SystemExit(f"{self.command}: blocks come in pairs, a spatial and a temporal one; ask for an even number of --blocks.")
        dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
        try:
            rates = HALF if args.like is None else rates_of(args.like)
        except FileError as error:
            raise SystemExit(f"{self.command}: {error}") from None
        first = DiTSubject(config, max(1, _FITTED // config.tokens), device, dtype)
        routers = routers_like(rates, first, eps_sigmas(STEPS)[:-1])
        print(f"{machine(device)}\n{self.whole.title}, {config.depth} of {self.whole.depth} blocks, {config.tokens} tokens, {str(dtype)[6:]}\n{rates}")
        rows = []
        for batch in args.batch:
            print(f"batch {batch} …", file=sys.stderr, flush=True)
            subject = DiTSubject(config, batch, device, dtype, first.model)
            rows += [(batch, row) for row in bench(subject, routers, args.budgets, args.repetitions, self.whole.depth)]
        print(layout(rows, self.thing), flush=True)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def bench(subject: DiTSubject, routers: DiTRouters, budgets: Sequence[float], repetitions: int, all_blocks: int) -> list[Row]:
    steps = eps_sigmas(STEPS)[:-1]
    return timed(subject, open_lanes(subject, routers, budgets, steps, all_blocks), steps[STEPS // 2:], repetitions, WARM_UP)


def open_lanes(subject: DiTSubject, routers: DiTRouters, budgets: Sequence[float], sigmas: Sequence[float], all_blocks: int) -> list[Lane]:
    """`all_blocks`: those of the whole model. Where a part of them runs, cut weights are held in as large a part of the room."""
    def begun(router: DiTRouters, budget: float) -> Run:
        run = Run(Plan(budget), Method(router, Nothing()), sigmas, Recorder())
        run.layouts.limit = LIMIT_BYTES * subject.config.depth // all_blocks
        return run

    own = routers.by_threshold()
    return [Lane("dense"), Lane("as published: masks", 0.0, begun(own, 0.0), family=MaskingFamily(subject.family), waits=True),
            Lane("ours, own threshold", 0.0, begun(own, 0.0), waits=True),
            *(Lane(f"ours, budget {budget:g}", budget, begun(routers, budget)) for budget in budgets)]


def layout(rows: Sequence[tuple[int, Row]], thing: str) -> str:
    heads = ("", "batch", "tokens kept", "block FLOPs", "seconds", f"each {thing}", "speed-up", "in theory", "achieved")
    return table(heads, [
        (row.lane.name, str(batch), _tokens(row), f"{row.fraction:.3f}", f"{row.seconds:.4g}", f"{row.seconds / batch:.4g}",
         f"{row.speed_up:.2f}", f"{row.theory:.2f}", f"{row.speed_up / row.theory:.0%}")
        for batch, row in rows
    ])


def _tokens(row: Row) -> str:
    """What the row of a batch that keeps least and the one that keeps most keep in a block: means over the blocks and evaluations measured."""
    if row.lane.run is None:
        return "all"
    kept = np.stack([one.mask().sum(2) for one in row.lane.run.recorder.evaluations[WARM_UP:]])
    least, most = (f"{extreme(kept, axis=2).mean():.0f}" for extreme in (np.min, np.max))
    return least if least == most else f"{least}–{most}"
