"""Writing the files that a conversion makes: all of them or none, every number checked on its way."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import bad
from .source import AGAIN
from .stream import Plan, write

# progress(done, total), in bytes of tensors
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Output:
    """A file to write; `pieces` as `stream.write` takes them."""

    path: Path
    plan: Plan
    pieces: Iterable[tuple[str, Tensor]]


def write_all(source: Path, outputs: Sequence[Output], progress: Progress) -> None:
    """Write `outputs`, which come from `source`, beside each other. Raises FileError."""
    folder = outputs[0].path.parent
    check_space(source, folder, [output.plan.bytes for output in outputs])
    total, done = sum(output.plan.numbers for output in outputs), 0

    def check(key: str, numbers: Tensor) -> None:
        nonlocal done
        if not torch.isfinite(numbers).all():
            raise bad(source, f"has numbers in {key} that are not finite (NaN or infinity)", AGAIN)
        done += numbers.nbytes
        progress(done, total)

    new = [output.path.with_name(f"{output.path.name}.new") for output in outputs]
    try:
        for output, target in zip(outputs, new):
            write(target, output.plan, output.pieces, check)
        # Earlier files stay whole until all of these are.
        for output, target in zip(outputs, new):
            target.replace(output.path)
    except OSError as error:
        raise bad(source, f"could not be written to {folder} ({error.strerror})", "make room there, or choose another folder") from None
    finally:
        for left in new:
            left.unlink(missing_ok=True)


def check_space(source: Path, folder: Path, sizes: Sequence[int]) -> None:
    """That files of `sizes` bytes, made of `source`, have room in `folder`, which is made. Raises FileError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise bad(source, f"cannot be converted into {folder} ({error.strerror})", "choose another folder") from None
    if free < sum(sizes):
        made = "a file" if len(sizes) == 1 else f"{len(sizes)} files"
        raise bad(source, f"becomes {made} of {sum(sizes) / 2**30:.1f} GB, and {folder} has {free / 2**30:.1f} GB free",
                  "make room there, or choose another folder")
