"""Gather and scatter of tokens, as a pair: `scatter_(x, index, gather(x, index))` leaves x as it is."""

from __future__ import annotations

from torch import Tensor


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `index` [rows, k] of `x` [rows, tokens, channels] (or [rows, tokens]): [rows, k, channels]."""
    if x.ndim == 2:
        return x.gather(1, index)
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))


def scatter_(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Write `values` [rows, k, channels] at tokens `index` [rows, k] of `x`, in place."""
    if x.ndim == 2:
        return x.scatter_(1, index, values)
    return x.scatter_(1, index[..., None].expand(-1, -1, x.shape[-1]), values)


def scatter_add_(x: Tensor, index: Tensor, values: Tensor) -> Tensor:
    """Add `values` [rows, k, channels] to tokens `index` [rows, k] of `x`, in place."""
    return x.scatter_add_(1, index[..., None].expand(-1, -1, x.shape[-1]), values)


def take_rows(table: Tensor, index: Tensor, dim: int) -> Tensor:
    """Entries `index` [rows, k] along `dim` of a table whose first axis is batch rows (or 1, shared by all rows)."""
    if table.shape[0] == 1 and index.shape[0] > 1:
        table = table.expand(index.shape[0], *table.shape[1:])
    shape = [index.shape[0]] + [1] * (table.ndim - 1)
    shape[dim] = index.shape[1]
    size = list(table.shape)
    size[dim] = index.shape[1]
    return table.gather(dim, index.view(shape).expand(size))
