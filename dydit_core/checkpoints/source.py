"""A file of named tensors, PyTorch's or safetensors', read a tensor at a time without ever being in memory.

A mapped file fills memory with the pages that were read from it until it is closed; `Source.tensors` opens it anew
every `_MAPPED` bytes, so that what a large file costs does not depend on its size.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .files import bad, is_pickle, opened

_MAPPED = 128 * 2**20
_LARGEST_INDEX = 64 * 2**20
_PREFIXES = ("module.", "_orig_mod.", "model.diffusion_model.")
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
        """None for types that no FLUX is computed in."""
        return _DTYPES.get(self.dtype)

    @property
    def bytes(self) -> int:
        """Size of the numbers, of a type that FLUX is computed in."""
        return self.elements * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Source:
    """`entries` by key, without the prefixes that DeepSpeed, torch.compile and ComfyUI leave on all of them."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]

    def tensors(self, keys: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """The tensors `keys`, in their order; each is valid until the next is asked for."""
        for batch in _batches(keys, self.entries):
            with _opened(self.path) as (_, _, read):
                for key in batch:
                    yield key, read(self.entries[key].name)


def open_source(path: Path) -> Source:
    """The index of `path`; no tensor is read. Raises FileError."""
    with _opened(path) as (entries, metadata, _):
        prefix = _common_prefix([entry.name for entry in entries])
        return Source(path, {entry.name[len(prefix):]: entry for entry in entries}, metadata)


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
def _opened(path: Path) -> Iterator[tuple[list[Entry], Mapping[str, str], Any]]:
    """Entries, metadata and a function that reads one tensor."""
    if path.is_file() and is_pickle(path):
        tensors = _unpickled(path)
        names = {dtype: name for name, dtype in _DTYPES.items()}
        yield [Entry(key, names.get(value.dtype, str(value.dtype)), tuple(value.shape)) for key, value in tensors.items()], {}, tensors.get
        return
    with opened(path, "convert it: python -m dydit_core convert", "choose a .pt or .safetensors file") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}
        entries = [Entry(key, part.get_dtype(), tuple(part.get_shape())) for key, part in slices.items()]
        yield entries, file.metadata() or {}, file.get_tensor


def _unpickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, mapped; under "module" as DeepSpeed saves them, or at the top."""
    _check_index(path)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        name = re.search(r"GLOBAL (\S+)", str(error))
        what = f"calls for code ({name[1][:80]}), which is never run" if name else "has a damaged index of tensors"
        raise bad(path, what, f"{AGAIN}, or as .safetensors") from None
    except (RuntimeError, EOFError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise bad(path, f"is damaged or not a PyTorch file ({type(error).__name__})", "download it again") from None
    tensors = found.get("module", found) if isinstance(found, dict) else None
    if not isinstance(tensors, dict) or not tensors:
        raise bad(path, f"holds a {type(found).__name__} where named tensors are expected", AGAIN)
    for key, value in tensors.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided or value.device.type != "cpu":
            raise bad(path, f"holds {str(key)[:80]!r}, which is not a plain tensor", AGAIN)
    return tensors


def _check_index(path: Path) -> None:
    """A file whose pickle is large is refused before it is unpickled; the tensors lie beside it."""
    try:
        with zipfile.ZipFile(path) as archive:
            sizes = [member.file_size for member in archive.infolist() if member.filename.endswith("data.pkl")]
    except (zipfile.BadZipFile, OSError):
        raise bad(path, "is a PyTorch file of before 2020, or damaged", f"{AGAIN}, or as .safetensors") from None
    if not sizes or max(sizes) > _LARGEST_INDEX:
        raise bad(path, "has no index of tensors, or one of more than 64 MB", AGAIN)
