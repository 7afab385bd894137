"""Make the demo model from nothing: `python -m dydit_core.demo.make --work DIR [STAGE …]`.

Every stage skips what is already done, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .base import CHECKPOINT, export_base, stages, train_base

WEIGHTS = Path(__file__).parent / "weights"
BASE_FILE = "diffusion_models/dydit_demo.safetensors"


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def make_base(args: argparse.Namespace) -> None:
    train_base(args.work, stages(args.windows, args.full, args.settle), args.seed, not args.eager, log)


def make_export(args: argparse.Namespace) -> None:
    export_base(args.work / CHECKPOINT, args.weights / BASE_FILE)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {"base": make_base, "export": make_export}


def main() -> None:
    parser = argparse.ArgumentParser(prog="dydit_core.demo.make", description=__doc__)
    parser.add_argument("stage", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}; all in order")
    parser.add_argument("--work", type=Path, default=Path.home() / "dydit_work", help="pictures and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished files go")
    parser.add_argument("--windows", type=int, default=600, help="training steps on 8 × 8-token windows")
    parser.add_argument("--full", type=int, default=1500, help="training steps on whole pictures")
    parser.add_argument("--settle", type=int, default=600, help="training steps with falling learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in args.stage:
        log(stage)
        STAGES[stage](args)


if __name__ == "__main__":
    main()
