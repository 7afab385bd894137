"""Tokens, rows and columns taken out of a tensor (`kept` has the pair that takes tokens out and puts them back).

Whole tokens are copied. `Tensor.gather` with an index expanded over the channels takes them one number at a time: ten
times slower on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .parts import Lines


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [rows, k] of `x` [rows, tokens, …]: [rows, k, …]."""
    first = torch.arange(x.shape[0], device=x.device)[:, None] * x.shape[1]
    return _take(x.flatten(0, 1), index + first)


def take_rows(table: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries `index` [rows, k] along `dim` of a table whose first axis is batch rows (or 1, shared by all rows)."""
    moved = table.movedim(dim, 1)
    taken = _take(moved[0], index) if table.shape[0] == 1 else gather(moved, index)
    return taken.movedim(1, dim)


def take_lines(x: Tensor, axis: int, lines: Lines, out: Tensor | None = None) -> Tensor:
    """Rows or columns `lines` along `axis`: of one run a view, of several a copy (into `out`, of that very shape)."""
    runs = [x.narrow(axis, start, stop - start) for start, stop in lines]
    return runs[0] if len(runs) == 1 else torch.cat(runs, axis, out=out)


def _take(x: Tensor, index: Tensor) -> Tensor:
    return x.index_select(0, index.flatten()).unflatten(0, index.shape)
