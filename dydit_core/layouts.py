"""Weights cut down to some heads and channel groups, laid out once for as long as the choice stays the same."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from weakref import ref

import torch
from torch import Tensor

from .gather import take_lines
from .parts import Lines, Weights

# Reading and writing a weight once takes a few hundredths of the product it is for, so beyond this they are cut anew.
LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class _Cut:
    source: ref[Tensor]
    version: tuple[int, int]
    lines: tuple[Lines, Lines]
    room: Tensor
    weights: Weights


class Layouts:
    """Cuts of one run, those that are held together at most `limit` bytes.

    A cut is used again while its layer holds the very same weight and the same rows and columns are asked for. All that
    are not held share one room, each until the next is cut: fresh memory costs a CPU ten times what the copying does.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.limit, self.held, self._age = limit, 0, 0
        self._cuts: dict[Hashable, _Cut] = {}
        self._fleeting: set[Hashable] = set()
        self._shared = torch.empty(0)

    def forget(self) -> None:
        """Weights may have changed in a way that they do not show (through `.data`): everything is cut again."""
        self._age += 1

    @torch.no_grad()
    def cut(self, key: Hashable, weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines) -> Weights:
        """See `blocks.Pass.cut`."""
        if len(rows) == len(columns) == 1:
            return _cut(weight, bias, rows, columns, None)
        version = self._age, 0 if weight.is_inference() else weight._version
        found = self._cuts.pop(key, None)
        if found and found.source() is weight and found.version == version and found.lines == (rows, columns):
            self._cuts[key] = found
            return found.weights
        if found and found.source() is None:
            # The host casts or patches this weight for each call: its cut will never be asked for again.
            self._fleeting.add(key)
            self.held -= found.room.nbytes
            found = None
        room = self._room(found and found.room, _count(rows) * _count(columns), weight, key in self._fleeting)
        weights = _cut(weight, bias, rows, columns, room)
        if room is not self._shared:
            self._cuts[key] = _Cut(ref(weight), version, (rows, columns), room, weights)
        return weights

    def _room(self, own: Tensor | None, size: int, like: Tensor, fleeting: bool) -> Tensor:
        """Room for `size` numbers: a layer's own again, new while that stays under the limit, or the shared one."""
        if own is not None:
            if _fits(own, size, like):
                return own
            self.held -= own.nbytes
        if not fleeting and self.held + size * like.element_size() <= self.limit:
            own = _new(size, like)
            self.held += own.nbytes
            return own
        if not _fits(self._shared, size, like):
            self._shared = _new(like.numel(), like)  # for any choice of lines: it is made once
        return self._shared


def _cut(weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines, room: Tensor | None) -> Weights:
    shape = _count(rows), _count(columns)
    out = None if room is None else room[:shape[0] * shape[1]].view(shape)
    # The axis of one run first, as a view.
    axes = [(1, columns), (0, rows)] if len(columns) == 1 else [(0, rows), (1, columns)]
    cut = take_lines(take_lines(weight, *axes[0]), *axes[1], out)
    return cut, None if bias is None else take_lines(bias, 0, rows)


def _count(lines: Lines) -> int:
    return sum(stop - start for start, stop in lines)


def _fits(room: Tensor, size: int, like: Tensor) -> bool:
    return room.numel() >= size and room.dtype == like.dtype and room.device == like.device


def _new(size: int, like: Tensor) -> Tensor:
    """Room that may be written to again with and without inference mode."""
    with torch.inference_mode(False):
        return torch.empty(size, dtype=like.dtype, device=like.device)
