"""`calibrate`: a DyDiT's file with what it takes to meet any budget from the first evaluation on.

How a router's scores are spread is not in the file that its authors released: at a budget it is then measured as the run goes,
behind a dense first evaluation. This draws pictures by the file's own decisions, their classes spread evenly, and writes the same
file with the spread it saw in each block at each noise level: python -m dydit_core calibrate FILE OUT.safetensors.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..bar import Bar
from ..budget import Plan
from ..checkpoints.convert_dit import calibrated_output
from ..checkpoints.dit import DiTFile, find_dit
from ..checkpoints.dit_keys import seems_dit
from ..checkpoints.files import FileError, bad, is_pickle
from ..checkpoints.outputs import Progress, check_space, write_all
from ..checkpoints.source import AGAIN, open_source
from ..families.known import family_of
from ..models.dit import EPS
from ..parts import Gate, Setting
from ..routers.calibration import MOST, Seen
from ..routers.dit import DiTRouters, DiTState
from ..routers.token import CapacityTable
from ..runtime import Method
from ..sampling import eps_sigmas, sample, sigmas
from ..standalone import Budgeted
from ..substitutes.nothing import Nothing

PICTURES, STEPS = 16, 20
_BATCH = 8
_CPU = torch.device("cpu")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a DyDiT as .safetensors, for example what convert writes")
    parser.add_argument("out", type=Path, help="the .safetensors to write")
    parser.add_argument("--pictures", type=_count, default=PICTURES, help=f"to draw ({PICTURES})")
    parser.add_argument("--steps", type=_count, default=STEPS, help=f"of sampling for each ({STEPS})")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture's noise (0)")
    parser.add_argument("--device", type=_device, default=_CPU, help="cpu, cuda or mps (cpu)")


def run(args: argparse.Namespace) -> None:
    bar = Bar(lambda total: f"{total} evaluations of a picture")
    try:
        made = calibrate_file(args.file, args.out, args.pictures, args.steps, args.seed, args.device, bar)
    except FileError as error:
        raise SystemExit(f"\n{error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; nothing was written.") from None
    print(f"{args.out}\n    {made}, calibrated on {args.pictures} pictures of {args.steps} steps: any budget holds from the first evaluation on")


def calibrate_file(path: Path, out: Path, pictures: int = PICTURES, steps: int = STEPS, seed: int = 0, device: torch.device = _CPU,
                   progress: Progress = lambda done, total: None) -> DiTFile:
    """Write the DyDiT in `path` with its capacity table to `out`, which is not there yet. Raises FileError."""
    found = _dynamic(path)
    if out.suffix != ".safetensors" or out.is_dir():
        raise bad(path, f"becomes one file, and {out.name or out} is no name of a .safetensors", "name the file to write")
    if out.resolve() == path.resolve():
        raise bad(path, "would be written over itself", "name another file")
    if out.exists():
        raise bad(path, f"would be written over {out}, which is there already", "name another file")
    check_space(path, out.parent, [path.stat().st_size])  # before the pictures, which take a while
    write_calibrated(found, measure(found, pictures, steps, seed, device, progress), out)
    return found


def write_calibrated(found: DiTFile, table: CapacityTable, out: Path) -> None:
    """Write all that `found` holds, with `table`, to `out`, whole or not at all. Raises FileError."""
    write_all(found.source.path, [calibrated_output(found, table, out)], lambda done, total: None)


def _dynamic(path: Path) -> DiTFile:
    """The DyDiT in `path`. Raises FileError for any other file."""
    if path.is_file() and is_pickle(path):
        raise bad(path, "is a PyTorch file (.pt)", "make a .safetensors of it first: python -m dydit_core convert FILE OUT.safetensors")
    source = open_source(path)
    if not seems_dit(source.entries):
        raise bad(path, "is no DyDiT", "choose one (python -m dydit_core inspect FILE says what a file is)")
    found = find_dit(source)
    if found.routers is None:
        raise bad(path, f"is a {found}", "choose a DyDiT, whose routers can be calibrated")
    return found


@torch.no_grad()
def measure(found: DiTFile, pictures: int = PICTURES, steps: int = STEPS, seed: int = 0, device: torch.device = _CPU,
            progress: Progress = lambda done, total: None) -> CapacityTable:
    """Quantiles of all token logits while the DyDiT `found` draws `pictures` at cfg 1 by its own decisions.

    Picture number i starts from the noise of `seed` + i. `progress(done, total)` is told evaluations, each of one picture.
    Raises FileError.
    """
    config, eps = found.config, found.config.prediction == EPS
    schedule = eps_sigmas(steps) if eps else sigmas(steps)
    if pictures * steps * config.tokens > MOST:
        raise bad(found.source.path, f"would give {pictures * steps * config.tokens} logits in each block, more than the {MOST} that can be held",
                  "choose fewer pictures or steps")
    routers, model, seen, done = found.read_routers(), found.read_model().to(device), Seen(config.depth), 0
    family = family_of(model)

    def hear(gate: Gate, logits: Tensor) -> None:
        nonlocal done
        seen.put(gate.block, family.level(model, torch.full((len(logits),), gate.sigma)), logits)
        if gate.block == config.depth - 1:
            done += len(logits)
            progress(done, pictures * steps)

    own = Method(_listening(routers, hear), Nothing())
    labels = torch.arange(pictures) * (config.classes or 1) // pictures
    for rows in torch.arange(pictures).split(_BATCH):
        noise = schedule[0] * torch.stack([_noise(config.latent_size, seed + row) for row in rows.tolist()])
        with Budgeted(model, Plan(0.0), own, schedule[:-1]) as drawing:
            sample(drawing, (labels[rows].to(device),), noise.to(device), steps, schedule=schedule)
    table = seen.table(schedule[0] if eps else None)
    if not table.quantiles.isfinite().all():
        raise bad(found.source.path, "gives logits that are not finite (NaN or infinity) while it draws", AGAIN)
    return table


def _noise(size: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True, eq=False)
class _Listening(DiTRouters):
    """Routers that tell `hear` all logits [rows, tokens] they decide by."""

    hear: Callable[[Gate, Tensor], None] | None = None

    def start(self, setting: Setting) -> _ListeningState:
        return _ListeningState(self, setting)


class _ListeningState(DiTState):
    def scores(self, gate: Gate) -> Tensor:
        logits = super().scores(gate)
        self.router.hear(gate, logits)
        return logits


def _listening(routers: DiTRouters, hear: Callable[[Gate, Tensor], None]) -> _Listening:
    """`routers` at their own threshold."""
    return _Listening(**vars(routers.by_threshold()), hear=hear)


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


def _device(text: str) -> torch.device:
    try:
        return torch.zeros(1, device=text).device
    except (RuntimeError, AssertionError):
        raise argparse.ArgumentTypeError(f"PyTorch has no device {text} here; choose cpu, or leave it out") from None
