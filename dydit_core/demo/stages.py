"""The frame of the commands that make the demo models: stages in order, and the flags that all of them have."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ..checkpoints.files import FileError
from ..train.session import OtherRun
from ..train.settings import SettingError
from .files import WEIGHTS

Stages = Mapping[str, Callable[[argparse.Namespace], None]]


def log(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def command(module: str, about: str, stages: Stages, work: Path) -> argparse.ArgumentParser:
    """Of `dydit_core.demo.<module>`, to which flags of its own are added; `work` is where it works if nothing is said."""
    parser = argparse.ArgumentParser(prog=f"dydit_core.demo.{module}", description=about)
    parser.add_argument("stage", nargs="*", default=list(stages), help=f"of {', '.join(stages)}; all in order")
    parser.add_argument("--work", type=Path, default=work, help="pictures and checkpoints")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="where the finished files go")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="processes that train together, one thread each")
    return parser


def run(parser: argparse.ArgumentParser, stages: Stages, argv: Sequence[str] | None = None) -> None:
    """The stages that are asked for; what is wrong with a file, a setting or a folder ends it in one sentence."""
    args = parser.parse_args(argv)
    unknown = [stage for stage in args.stage if stage not in stages]
    if unknown:
        parser.error(f"there is no stage {unknown[0]}; choose of {', '.join(stages)}")
    for stage in args.stage:
        log(stage)
        try:
            stages[stage](args)
        except (FileError, SettingError, OtherRun) as error:
            raise SystemExit(str(error)) from None
