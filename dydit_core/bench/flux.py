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
from collections.abc import Sequence

import torch

from ..budget import Plan
from ..models.flux import FluxConfig
from ..recorder import Recorder
from ..runtime import Method, Run
from ..substitutes.nothing import Nothing
from .lanes import NAMES, open_lanes, token_scores
from .published import DENSE, OFFICIAL_KEEP, OURS, PUBLISHED, EvenRouter, PublishedFamily, whole_model
from .report import machine, table
from .subject import ARCHITECTURES, Subject, for_cpu
from .timing import Lane, report, schedule


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
