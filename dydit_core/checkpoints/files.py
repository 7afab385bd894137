"""Files that come from elsewhere: refused in one sentence before anything in them is used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open


class FileError(ValueError):
    """One sentence: the file, the key, what is wrong with it, and what to do."""


def bad(path: Path, problem: str, remedy: str) -> FileError:
    return FileError(f"{path.name} {problem}; {remedy}.")


def is_pickle(path: Path) -> bool:
    """A PyTorch file, zipped or not, whatever its name says."""
    try:
        with open(path, "rb") as file:
            start = file.read(2)
    except PermissionError:
        raise bad(path, "may not be read by this user", "give yourself permission to read it") from None
    return start == b"PK" or (start[:1] == b"\x80" and start[1:] in b"\x02\x03\x04\x05")


@contextmanager
def opened(path: Path, wanted: str, remedy: str) -> Iterator[Any]:
    """The safetensors file `path` with its header read and no tensor. `wanted`: what should be chosen instead."""
    if not path.is_file():
        raise bad(path, f"is not a file ({path})", remedy)
    if is_pickle(path):
        raise bad(path, "is a PyTorch file (.pt), whatever its name says", wanted)
    with open(path, "rb") as file:
        if file.read(9)[8:] != b"{":
            raise bad(path, "is not a safetensors file", "download it again, or choose another file")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except SafetensorError as error:
        raise bad(path, f"is damaged or not a safetensors file ({error})", "download it again") from None
