"""Gather and scatter of tokens, as a pair: `scatter_(x, index, gather(x, index))` leaves x as it is.

Indexing with one index per axis copies whole tokens; `Tensor.gather` with an index expanded over the channels takes
them one number at a time, four times slower on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _rows(index: Tensor) -> Tensor:
    return torch.arange(index.shape[0], device=index.device)[:, None]


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [rows, k] of `x` [rows, tokens, …]: [rows, k, …]."""
    return x[_rows(index), index]


def scatter_(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write `values` [rows, k, …] at tokens `index` [rows, k] of `x` [rows, tokens, …], in place."""
    return x.index_put_((_rows(index), index), values)


def take_rows(table: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries `index` [rows, k] along `dim` of a table whose first axis is batch rows (or 1, shared by all rows)."""
    moved = table.movedim(dim, 1)
    return gather(moved.expand(index.shape[0], *moved.shape[1:]), index).movedim(1, dim)
