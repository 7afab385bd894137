"""Weights cut down to some heads and channel groups, laid out once for as long as the choice stays the same."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

import torch
from torch import Tensor

from .gather import take_lines
from .parts import Lines, Weights

# Reading and writing a weight once takes a few hundredths of the product it is for, so beyond this they are cut anew.
LIMIT_BYTES = 1 << 30


@dataclass(frozen=True)
class _Cut:
    source: Tensor
    version: int
    rows: Lines
    columns: Lines
    weights: Weights

    @property
    def nbytes(self) -> int:
        return self.weights[0].nbytes


class Layouts:
    """Cuts of one run, together at most `limit` bytes.

    A cut is used again while its layer holds the very same weight and the same rows and columns are asked for. Where
    a host casts or patches weights for each call, they are cut for each call.
    """

    def __init__(self, limit: int = LIMIT_BYTES) -> None:
        self.limit, self.held = limit, 0
        self._cuts: dict[Hashable, _Cut] = {}

    def cut(self, key: Hashable, weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines) -> Weights:
        """See `parts.Pass.cut`."""
        if isinstance(rows, slice) and isinstance(columns, slice):
            return _cut(weight, bias, rows, columns)
        version = 0 if weight.is_inference() else weight._version
        found = self._cuts.get(key)
        if found and found.source is weight and found.version == version and _same(found.rows, rows) and _same(found.columns, columns):
            return found.weights
        cut = _Cut(weight, version, rows, columns, _cut(weight, bias, rows, columns))
        if found:
            self.held -= self._cuts.pop(key).nbytes
        if self.held + cut.nbytes <= self.limit:
            self._cuts[key] = cut
            self.held += cut.nbytes
        return cut.weights


def _cut(weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines) -> Weights:
    cut = take_lines(take_lines(weight, 0, rows), 1, columns)
    return cut, None if bias is None else take_lines(bias, 0, rows)


def _same(one: Lines, other: Lines) -> bool:
    if isinstance(one, slice) or isinstance(other, slice):
        return isinstance(one, slice) and isinstance(other, slice) and one == other
    return torch.equal(one, other)
