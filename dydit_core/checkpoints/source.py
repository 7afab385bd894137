"""A file of named tensors, PyTorch's or safetensors', read a tensor at a time without ever being in memory.

A mapped file fills memory with the pages that were read from it until it is closed; `Source.tensors` opens it anew
every `_MAPPED` bytes, so that what a large file costs does not depend on its size.
"""

from __future__ import annotations

import argparse
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import bad, is_pickle, opened

_MAPPED = 128 * 2**20
_LARGEST_INDEX = 64 * 2**20
_PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.")
# Where a PyTorch file keeps its tensors, best first: averaged weights, those of the last training step, DeepSpeed's.
_WRAPPERS = ("ema", "model", "module")
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
AGAIN = "get the file again from where it was published"


@dataclass(frozen=True)
class Entry:
    """A tensor without its numbers: `dtype` as safetensors call it ("BF16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """None for types that no model is computed in."""
        return _DTYPES.get(self.dtype)

    @property
    def bytes(self) -> int:
        """Size of the numbers, of a type that models are computed in."""
        return self.elements * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Source:
    """`entries` by key, without the prefixes that DeepSpeed, torch.compile and ComfyUI leave on all of them.

    `under`: the key of a PyTorch file that they lie under ("ema"), "" at the top. `arguments`: those of the training
    command, where the file has them.
    """

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    under: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors `keys`, in their order; each is valid until the next is asked for."""
        for batch in _batches(keys, self.entries):
            with _opened(self.path) as (_, read):
                for key in batch:
                    yield key, read(self.entries[key].name)


def open_source(path: Path) -> Source:
    """The index of `path`; no tensor is read. Raises FileError."""
    with _opened(path) as (source, _):
        prefix = _common_prefix(list(source.entries))
        return replace(source, entries={name[len(prefix):]: entry for name, entry in source.entries.items()})


def check_entries(source: Source, shapes: Mapping[str, tuple[int, ...]], what: str) -> str:
    """That `source` has these tensors in one floating type, which is returned ("BF16"). Raises FileError."""
    first: Entry | None = None
    for key, shape in shapes.items():
        entry = source.entries.get(key)
        if entry is None:
            raise bad(source.path, f"lacks the tensor {key}", AGAIN)
        if entry.shape != shape:
            raise bad(source.path, f"has {key} of size {list(entry.shape)} where its other tensors say {list(shape)}", AGAIN)
        if entry.torch_dtype is None:
            raise bad(source.path, f"has {key} in {entry.dtype}, and {what} are bfloat16, float16 or float32", AGAIN)
        first = first or entry
        if entry.dtype != first.dtype:
            raise bad(source.path, f"has {key} in {entry.dtype} and {first.name} in {first.dtype}; all {what} must be of one type", AGAIN)
    return first.dtype


def _common_prefix(names: list[str]) -> str:
    """What DeepSpeed, torch.compile and ComfyUI put before every name, once or nested."""
    found = ""
    while more := next((prefix for prefix in _PREFIXES if names and all(name.startswith(found + prefix) for name in names)), ""):
        found += more
    return found


def _batches(keys: Iterable[str], entries: Mapping[str, Entry]) -> Iterator[list[str]]:
    batch, size = [], 0
    for key in keys:
        batch.append(key)
        size += entries[key].bytes
        if size >= _MAPPED:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Source, Callable[[str], Tensor]]]:
    """The index by the names in the file, and a function that reads one tensor."""
    if path.is_file() and is_pickle(path):
        under, tensors, arguments = _unpickled(path)
        names = {dtype: name for name, dtype in _DTYPES.items()}
        entries = {key: Entry(key, names.get(value.dtype, str(value.dtype)), tuple(value.shape)) for key, value in tensors.items()}
        yield Source(path, entries, {}, under, arguments), tensors.__getitem__
        return
    with opened(path, "convert it: python -m dydit_core convert", "choose a .pt or .safetensors file") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        entries = {key: Entry(key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()}
        yield Source(path, entries, file.metadata() or {}), file.get_tensor


def _unpickled(path: Path) -> tuple[str, dict[str, Tensor], dict[str, Any]]:
    """The tensors of a PyTorch file, mapped, and the key they lie under; the arguments of its training.

    Those are an `argparse.Namespace`, the one class that is let in: it only holds what was typed.
    """
    _check_index(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls for code ({name[1][:80]}), which is never run" if name else "has a damaged index of tensors"
        raise bad(path, what, f"{AGAIN}, or as .safetensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise bad(path, f"is damaged or not a PyTorch file ({type(error).__name__})", "download it again") from None
    whole = found if isinstance(found, dict) else {}
    under = next((key for key in _WRAPPERS if isinstance(whole.get(key), dict)), "")
    tensors = whole[under] if under else whole
    if not tensors:
        raise bad(path, f"holds a {type(found).__name__} where named tensors are expected", AGAIN)
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise bad(path, f"holds {str(key)[:80]!r}, which is not a plain tensor", AGAIN)
    arguments = whole.get("args")
    return under, tensors, dict(vars(arguments)) if isinstance(arguments, argparse.Namespace) else {}


def _check_index(path: Path) -> None:
    """A file whose pickle is large is refused before it is unpickled; the tensors lie beside it."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [member.file_size for member in archive.infolist() if member.filename.endswith("data.pkl")]
    except (zipfile.BadZipFile, OSError):
        raise bad(path, "is a PyTorch file of before 2020, or damaged", f"{AGAIN}, or as .safetensors") from None
    if not sizes or max(sizes) > _LARGEST_INDEX:
        raise bad(path, "has no index of tensors, or one of more than 64 MB", AGAIN)
