"""Make the demo model from nothing: `python -m dydit_core.demo.make --work DIR [STAGE …]`.

Every stage skips what is already done, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from .base import CHECKPOINT, export_base, stages, train_base
from .checker import export_checker, train_checker
from .data import load_codec
from .decoder import train_decoder
from .vae import export_vae
from .files import BASE_FILE, CHECKER_FILE, VAE_FILE, WEIGHTS


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def make_base(args: argparse.Namespace) -> None:
    train_base(args.work, stages(args.windows, args.full, args.settle), args.seed, args.processes, not args.eager, log)


def make_vae(args: argparse.Namespace) -> None:
    decoder = train_decoder(args.work, args.decoder, args.seed, log)
    export_vae(load_codec(args.work, log), decoder, args.weights / VAE_FILE)


def make_checker(args: argparse.Namespace) -> None:
    decoder = train_decoder(args.work, args.decoder, args.seed, log)
    export_checker(train_checker(args.work, decoder, args.checker, args.seed, log), args.weights / CHECKER_FILE)


def make_export(args: argparse.Namespace) -> None:
    export_base(args.work / CHECKPOINT, args.weights / BASE_FILE)


STAGES: dict[str, Callable[[argparse.Namespace], None]] = {
    "vae": make_vae,
    "checker": make_checker,
    "base": make_base,
    "export": make_export,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="dydit_core.demo.make", description=__doc__)
    parser.add_argument("stage", nargs="*", default=list(STAGES), help=f"of {', '.join(STAGES)}; all in order")
    parser.add_argument("--work", type=Path, default=Path.home() / "dydit_work", help="pictures and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished files go")
    parser.add_argument("--decoder", type=int, default=1200, help="training steps of the VAE's decoder")
    parser.add_argument("--checker", type=int, default=1500, help="training steps of the checker")
    parser.add_argument("--windows", type=int, default=600, help="training steps on 8 × 8-token windows")
    parser.add_argument("--full", type=int, default=1500, help="training steps on whole pictures")
    parser.add_argument("--settle", type=int, default=600, help="training steps with falling learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="processes that train together, one thread each")
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    args = parser.parse_args()
    for stage in args.stage:
        log(stage)
        STAGES[stage](args)


if __name__ == "__main__":
    main()
