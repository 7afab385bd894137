"""Writing a safetensors file a tensor at a time: the library's own writer wants all of them in memory.

The format: the length of the header (8 bytes, little-endian), the header in JSON with the type, size and place of every
tensor, and the numbers (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..storage import write_atomically
from .source import Entry

_CHUNK = 2**22  # numbers written at a time


@dataclass(frozen=True)
class Plan:
    """A file before it is written: its tensors in the order they are written."""

    entries: Sequence[Entry]
    metadata: Mapping[str, str]

    @property
    def header(self) -> bytes:
        described, start = {"__metadata__": dict(self.metadata)}, 0
        for entry in self.entries:
            stop = start + entry.bytes
            described[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
        return text + b" " * (-len(text) % 8)

    @property
    def bytes(self) -> int:
        """Size of the whole file."""
        return 8 + len(self.header) + self.numbers

    @property
    def numbers(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self.entries)


def write(path: Path, plan: Plan, pieces: Iterable[tuple[str, Tensor]], check: Callable[[str, Tensor], None]) -> None:
    """Write `plan` to `path`, whole or not at all.

    `pieces`: the numbers of all tensors one after another, cut anywhere, and a name for each piece; `check` sees that
    name and every part of the piece before it is written.
    """
    def fill(partial: Path) -> None:
        with open(partial, "wb") as file:
            header = plan.header
            file.write(struct.pack("<Q", len(header)) + header)
            for name, piece in pieces:
                for chunk in piece.detach().reshape(-1).split(_CHUNK):
                    check(name, chunk)
                    file.write(chunk.view(torch.uint8).numpy().data)
            if file.tell() != plan.bytes:
                raise ValueError(f"{path.name}: {file.tell()} bytes were written where {plan.bytes} were planned.")

    write_atomically(path, fill)
