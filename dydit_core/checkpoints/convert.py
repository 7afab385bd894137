"""`convert`: a released DyDiT, DiT, SiT, Latte (.pt) or DyDiT FLUX as .safetensors that ComfyUI loads.

Of a DiT or Latte one file is written, with its routers where it has them: python -m dydit_core convert FILE OUT.safetensors, for
models/diffusion_models and DyDiT Checkpoint Loader. Of a DyDiT FLUX two are written into a folder: the base, for
models/diffusion_models and the stock Load Diffusion Model, and its token routers, for models/dydit and DyDiT Adapter Loader.
The file is read a tensor at a time: memory stays small whatever its size. Every key, size, type and number is checked.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from ..bar import Bar
from .convert_dit import dit_output
from .convert_flux import flux_outputs
from .dit import PREDICTIONS, DiTFile, find_dit
from .dit_keys import seems_dit
from .files import FileError
from .outputs import Progress, write_all
from .source import open_source


@dataclass(frozen=True)
class Converted:
    """What was written. `routers`: of a FLUX; a DiT's are in one file with their `base`, and `dit` is what that holds."""

    base: Path
    routers: Path | None = None
    dit: DiTFile | None = None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the released file, for example new_dydit0.5.pt or transformer_230000.pt")
    parser.add_argument("out", type=Path, help="the file to write, or a folder for it; of a FLUX the folder for two files")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="of a DiT: eps (DiT) or flow (SiT), where the file does not say")
    parser.add_argument("--heads", type=int, metavar="NUMBER", help="of a DiT or Latte: its attention heads, where the file does not say")


def run(args: argparse.Namespace) -> None:
    try:
        made = convert(args.file, args.out, Bar(lambda total: f"{total / 2**30:.2f} GB"), args.prediction, args.heads)
    except FileError as error:
        raise SystemExit(f"\n{error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; nothing was written.") from None
    print("\n".join(_told(made)))
    peak = _peak_memory()
    if peak:
        print(f"Most memory in use: {peak / 2**20:.0f} MB, for a file of {args.file.stat().st_size / 2**20:.0f} MB.")


def convert(path: Path, out: Path, progress: Progress = lambda done, total: None, prediction: str | None = None,
            heads: int | None = None) -> Converted:
    """Write what `path` holds to `out`, a folder or, of a DiT, a file. Raises FileError.

    `progress(done, total)` is told bytes of tensors. `prediction` and `heads`: see `find_dit`.
    """
    source = open_source(path)
    if seems_dit(source.entries):
        found = find_dit(source, prediction, heads)
        output = dit_output(found, out)
        write_all(path, [output], progress)
        return Converted(output.path, dit=found)
    base, routers = flux_outputs(source, out)
    write_all(path, [base, routers], progress)
    return Converted(base.path, routers.path)


def _told(made: Converted) -> list[str]:
    if made.dit is not None:
        found, taken = made.dit, f'; of the file\'s weights those under "{made.dit.source.under}" were taken' if made.dit.source.under else ""
        lines = [f"{made.base}\n    {found}, for models/diffusion_models (DyDiT Checkpoint Loader)",
                 f"    predicts {found.config.prediction}: {found.known_by}{taken}"]
        if found.routers is not None and not found.calibrated:
            lines.append(f"    for any budget from the first evaluation on: python -m dydit_core calibrate {made.base} OUT.safetensors")
        return lines
    return [f"{made.base}\n    the base model, for models/diffusion_models (Load Diffusion Model)",
            f"{made.routers}\n    its token routers, for models/dydit (DyDiT Adapter Loader)"]


def _peak_memory() -> int | None:
    """Bytes this process has held at most, mapped pages included, or None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
