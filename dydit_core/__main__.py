"""`python -m dydit_core <command>`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

# Each is a module with `add_arguments(parser)` and `run(args)`.
COMMANDS = {
    "demo": "dydit_core.demo.page",
    "convert": "dydit_core.checkpoints.convert",
    "calibrate": "dydit_core.train.calibrate_dit",
    "inspect": "dydit_core.checkpoints.inspect",
    "train": "dydit_core.train.command",
    "bench flux": "dydit_core.bench.flux",
    "bench dit": "dydit_core.bench.dit",
    "bench latte": "dydit_core.bench.latte",
    "bench quality": "dydit_core.bench.quality",
    "bench trace": "dydit_core.bench.trace",
}
_GROUPS = {"bench": "measure speed, pictures and the record of a run"}


def build_parser() -> argparse.ArgumentParser:
    """A command of two words ("bench flux") is a sub-command of the first."""
    parser = argparse.ArgumentParser(prog="python -m dydit_core", description="DyDiT for ComfyUI, from the command line.")
    groups = {"": parser.add_subparsers(required=True, metavar="command")}
    for name, module_name in COMMANDS.items():
        module = import_module(module_name)
        first, _, second = name.partition(" ")
        if second and first not in groups:
            groups[first] = groups[""].add_parser(first, help=_GROUPS[first]).add_subparsers(required=True, metavar="what")
        summary = module.__doc__.partition("\n")[0]
        command = groups[first if second else ""].add_parser(second or first, help=summary, description=module.__doc__,
                                                             formatter_class=argparse.RawDescriptionHelpFormatter)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    # On a fresh install the first import of PyTorch takes long enough to look like a hang.
    print("Loading PyTorch …", file=sys.stderr, flush=True)
    args = build_parser().parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
