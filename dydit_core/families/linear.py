"""Linear layers of a block at less than full width, and with a low-rank addition.

A head or a channel group that is not computed is not multiplied by zero: its rows are cut out of the weights that make
it, and its columns out of those that read it (DyDiT, arXiv 2410.03456 §3.2). A layer whose weight cannot be cut runs
whole: zeros take the place of the inputs that were not computed, and the outputs that were asked for are picked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from operator import attrgetter

from torch import Tensor, nn

from ..blocks import Backend, Pass
from ..gather import take_lines
from ..parts import Lines, LowRank, Width


def channels(units: Tensor | None, size: int, every: int, start: int = 0) -> Lines:
    """Channels of the rising `units` of `size` channels each, the first at channel `start`; without units all `every` of them."""
    if units is None:
        return ((start, start + every),)
    return _runs(tuple(units.tolist()), size, (start,))


@lru_cache(maxsize=4096)
def _runs(units: tuple[int, ...], size: int, starts: tuple[int, ...]) -> Lines:
    # Remembered: while a GPU works on a small block, counting these is most of what the CPU does.
    return joined((start + unit * size, start + (unit + 1) * size) for start in starts for unit in units)


def joined(runs: Iterable[tuple[int, int]]) -> Lines:
    """Rising runs, those that touch made one."""
    lines: list[tuple[int, int]] = []
    for start, stop in runs:
        if lines and lines[-1][1] == start:
            start = lines.pop()[0]
        lines.append((start, stop))
    return tuple(lines)


def fused(width: Width, count: int, head: int, size: int, start: int = 0) -> Lines:
    """Rows of `count` fused projections of `size` channels, from row `start`, for the heads of `width`."""
    if width.heads is None:
        return ((start, start + count * size),)
    return _runs(tuple(width.heads.tolist()), head, tuple(range(start, start + count * size, size)))


def split_heads(x: Tensor, count: int, head: int) -> Tensor:
    """[rows, tokens, count · heads · head] to [count, rows, heads, tokens, head]."""
    return x.unflatten(-1, (count, -1, head)).permute(2, 0, 3, 1, 4)


def gated(x: Tensor, gate: Tensor | None) -> Tensor:
    """`x` [rows, tokens, units · size] times `gate` [rows, units]."""
    return x if gate is None else (x.unflatten(-1, (gate.shape[1], -1)) * gate[:, None, :, None].to(x)).flatten(-2)


def linear(current: Pass, backend: Backend, index: int, block: nn.Module, name: str, x: Tensor, rows: Lines | None = None,
           columns: Lines | None = None) -> Tensor:
    """Layer `name` of block number `index`: the outputs `rows` (None: all) from the inputs `columns`, which is what `x` holds."""
    layer = attrgetter(name)(block)
    every, all_inputs = ((0, layer.out_features),), ((0, layer.in_features),)
    rows, columns = rows or every, columns or all_inputs
    if rows == every and columns == all_inputs:
        return _added(current.low_rank(index, name, x), layer(x), x, rows, columns)
    if backend.unsliceable(layer) is not None:
        out = layer(_spread(x, columns, layer.in_features))
        return _added(current.low_rank(index, name, x), take_lines(out, -1, rows), x, rows, columns)
    with opened(current, backend, index, block, name, x) as run:
        return run(x, rows, columns)


def two_layers(current: Pass, backend: Backend, index: int, block: nn.Module, name: str, layers: tuple[str, str],
               activation: Callable[[Tensor], Tensor], x: Tensor, width: Width) -> Tensor:
    """The MLP `name` of a block, at the channel groups of `width`: through the module itself where nothing is cut or added."""
    module, paths = attrgetter(name)(block), [f"{name}.{layer}" for layer in layers]
    if width.groups is None and width.group_gate is None and not any(current.low_rank(index, path, x) for path in paths):
        return module(x)
    size = module.get_submodule(layers[0]).out_features
    lines = channels(width.groups, size // max(1, width.group_count), size)
    hidden = gated(activation(linear(current, backend, index, block, paths[0], x, lines)), width.group_gate)
    return linear(current, backend, index, block, paths[1], hidden, columns=lines)


@contextmanager
def opened(current: Pass, backend: Backend, index: int, block: nn.Module, name: str, x: Tensor) -> Iterator[Callable[..., Tensor]]:
    """A layer whose weight is fetched once for several parts of its outputs: `run(x, rows, columns, part)`."""
    module = attrgetter(name)(block)
    inputs = module.in_features
    with backend.weights(module, x) as layer:
        low = current.low_rank(index, name, x)

        def run(x: Tensor, rows: Lines, columns: Lines = ((0, inputs),), part: str = "") -> Tensor:
            out = layer.product(x, *current.cut((index, name, part), layer.weight, layer.bias, rows, columns))
            return _added(low, out, x, rows, columns)

        yield run


def _added(low: LowRank | None, out: Tensor, x: Tensor, rows: Lines, columns: Lines) -> Tensor:
    if low is None:
        return out
    down, up = take_lines(low.down, -1, columns), take_lines(low.up, -2, rows)
    return out + x @ down.mT @ up.mT


def _spread(x: Tensor, columns: Lines, size: int) -> Tensor:
    if x.shape[-1] == size:
        return x
    spread, taken = x.new_zeros(*x.shape[:-1], size), 0
    for start, stop in columns:
        spread[..., start:stop] = x[..., taken:taken + stop - start]
        taken += stop - start
    return spread
