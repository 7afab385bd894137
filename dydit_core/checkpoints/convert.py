"""`convert`: a released DyDiT FLUX file (.pt, or .safetensors in diffusers' layout) to two that ComfyUI loads.

FOLDER receives the base, for the stock Load Diffusion Model, and its token routers, for DyDiT Adapter Loader. Put the
first in models/diffusion_models and the second in models/dydit. The file is read a tensor at a time: memory stays small
whatever its size. Every key, size, type and number is checked.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .files import FileError, bad
from .fit import Fit, Sketch, sketch_of
from .flux_keys import ROUTER, SWAPPED, Sizes, base_keys, read_sizes, router_keys, router_shapes, source_shapes
from .routers import check_entries, metadata
from .source import AGAIN, Entry, Source, open_source
from .stream import Plan, write

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Converted:
    """What was written."""

    base: Path
    routers: Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="the released file, for example transformer_230000.pt")
    parser.add_argument("folder", type=Path, help="where the two files go")


def run(args: argparse.Namespace) -> None:
    try:
        made = convert(args.file, args.folder, _Bar())
    except FileError as error:
        raise SystemExit(f"\n{error}") from None
    except KeyboardInterrupt:
        raise SystemExit("\nStopped; nothing was written.") from None
    print(f"{made.base}\n    the base model, for models/diffusion_models (Load Diffusion Model)")
    print(f"{made.routers}\n    its token routers, for models/dydit (DyDiT Adapter Loader)")
    peak = _peak_memory()
    if peak:
        print(f"Most memory in use: {peak / 2**20:.0f} MB, for a file of {args.file.stat().st_size / 2**20:.0f} MB.")


def convert(path: Path, folder: Path, progress: Progress = lambda done, total: None) -> Converted:
    """Write the base and the routers of `path` into `folder`. Raises FileError.

    `progress(done, total)` is told bytes of tensors.
    """
    source = open_source(path)
    sizes = _sizes(source)
    fused, theirs = base_keys(sizes), router_keys(sizes.layout, diffusers=True)
    base, routers = _plans(source, sizes, fused, theirs)
    made = Converted(folder / f"{path.stem}_base.safetensors", folder / f"{path.stem}_routers.safetensors")
    total, done = base.numbers + routers.numbers, 0
    _check_space(path, folder, base.bytes + routers.bytes)

    def check(key: str, numbers: Tensor) -> None:
        nonlocal done
        if not torch.isfinite(numbers).all():
            raise bad(path, f"has numbers in {key} that are not finite (NaN or infinity)", AGAIN)
        done += numbers.nbytes
        progress(done, total)

    new = Converted(*(target.with_name(f"{target.name}.new") for target in (made.base, made.routers)))
    try:
        write(new.routers, routers, source.tensors(theirs.values()), check)
        write(new.base, base, _unswapped(source.tensors(key for parts in fused.values() for key in parts)), check)
        # Both or none: an earlier pair stays whole until this one is.
        new.base.replace(made.base)
        new.routers.replace(made.routers)
    except OSError as error:
        raise bad(path, f"could not be written to {folder} ({error.strerror})", "make room there, or choose another folder") from None
    finally:
        for left in (new.base, new.routers):
            left.unlink(missing_ok=True)
    return made


def refusal(source: Source) -> str | None:
    """Why `convert` would not take this file, from its header, or None."""
    try:
        _sizes(source)
    except FileError as error:
        return str(error)
    return None


def _sizes(source: Source) -> Sizes:
    """Sizes of the model, everything about its keys checked."""
    path, entries = source.path, source.entries
    if "img_in.weight" in entries:
        raise bad(path, "is in ComfyUI's layout already",
                  "load it with DyDiT Checkpoint Loader if it has routers, else with Load Diffusion Model")
    sizes = read_sizes({key: entry.shape for key, entry in entries.items()})
    if isinstance(sizes, str):
        raise bad(path, f"is no FLUX in diffusers' layout (it lacks a tensor {sizes} of a fitting size)",
                  "choose the released transformer, for example transformer_230000.pt")
    if not any(f".{ROUTER}." in key for key in entries):
        raise bad(path, "is a FLUX without token routers", "load it with Load Diffusion Model, which reads diffusers' layout too")
    base, theirs = source_shapes(sizes), router_keys(sizes.layout, diffusers=True)
    routers = dict(zip(theirs.values(), router_shapes(sizes.layout).values()))
    check_entries(source, base, "tensors of the base")
    check_entries(source, routers, "routers")
    extra = sorted(set(entries) - set(base) - set(routers))
    if extra:
        raise bad(path, f"has a tensor {extra[0][:80]} that no DyDiT FLUX file has", AGAIN)
    return sizes


def _plans(source: Source, sizes: Sizes, fused: dict[str, tuple[str, ...]], theirs: dict[str, str]) -> tuple[Plan, Plan]:
    """The base and the router file, before they are written."""
    def joined(key: str, parts: tuple[str, ...]) -> Entry:
        first = source.entries[parts[0]]
        rows = sum(source.entries[part].shape[0] for part in parts)
        return Entry(key, first.dtype, (rows, *first.shape[1:]))

    base = [joined(key, parts) for key, parts in fused.items()]
    routers = [Entry(ours, source.entries[key].dtype, source.entries[key].shape) for ours, key in theirs.items()]
    title = f"Token routers of {source.path.stem}"
    fit = Fit(title, sizes.layout, _sketch(source, sizes, fused))
    words = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "flux-1",
             "modelspec.title": f"Base of {source.path.stem}"}
    return Plan(base, words), Plan(routers, metadata(fit, routers[0].dtype))


def _sketch(source: Source, sizes: Sizes, fused: dict[str, tuple[str, ...]]) -> Sketch:
    def find(name: str) -> Tensor:
        key = name if name.endswith(".bias") else f"{name}.scale"
        return next(tensor for _, tensor in source.tensors(fused[key]))

    return sketch_of(find, sizes.layout.double, sizes.layout.single)


def _unswapped(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """diffusers' final modulation is (scale, shift), BFL's (shift, scale)."""
    for key, tensor in tensors:
        if key.startswith(SWAPPED):
            scale, shift = tensor.chunk(2)
            yield key, shift
            yield key, scale
        else:
            yield key, tensor


def _check_space(path: Path, folder: Path, needed: int) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise bad(path, f"cannot be converted into {folder} ({error.strerror})", "choose another folder") from None
    if free < needed:
        raise bad(path, f"becomes two files of {needed / 2**30:.1f} GB together, and {folder} has {free / 2**30:.1f} GB free",
                  "make room there, or choose another folder")


class _Bar:
    """Percent done, on stderr; a line that is written over as long as it grows."""

    def __init__(self) -> None:
        self._shown = -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total
        if percent != self._shown:
            self._shown = percent
            print(f"\r{percent:3} % of {total / 2**30:.2f} GB", end="\n" if percent == 100 else "", file=sys.stderr, flush=True)


def _peak_memory() -> int | None:
    """Bytes this process has held at most, mapped pages included, or None where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
