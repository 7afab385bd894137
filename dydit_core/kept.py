"""The image tokens that a block computes: taken out of all tokens before the work, put back after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kept:
    """`index`: sorted token indices [rows, k] where each of `rows` batch rows keeps equally many of its `tokens`.

    Where they do not, [1, K] into the tokens of all rows, one row after another: so what works on each token alone is one
    product without padding. "R × k" below is rows × k, or 1 × K. `counts`: how many each row keeps, where that is known.
    """

    index: Tensor
    rows: int
    tokens: int
    counts: tuple[int, ...] | None = None

    @staticmethod
    def best(scores: Tensor, counts: Sequence[tuple[slice, int]]) -> Kept:
        """The highest of `scores` [rows, tokens]: how many, by slices of rows in their order."""
        rows, tokens = scores.shape
        found = [scores[part].topk(count, dim=1, sorted=False).indices.sort(dim=1).values for part, count in counts]
        if len(found) == 1:
            return Kept(found[0], rows, tokens)
        first = _first(rows, tokens, scores.device)
        flat = torch.cat([(index + first[part]).flatten() for index, (part, _) in zip(found, counts)])
        return Kept(flat[None], rows, tokens, tuple(count for part, count in counts for _ in range(rows)[part]))

    @staticmethod
    def above(scores: Tensor, threshold: float) -> Kept:
        """Every token whose score is above: how many is only known when the device has them, so this waits for it."""
        return Kept((scores > threshold).flatten().nonzero().T, *scores.shape)

    @property
    def count(self) -> int:
        """Tokens in all rows together."""
        return self.index.numel()

    def take(self, x: Tensor) -> Tensor:
        """[R, k, …] of `x` [rows, tokens, …]; of `x` [rows, 1, …] what broadcasts to that."""
        if x.shape[1] != self.tokens:
            return x if self._even else x[:, 0].index_select(0, self._row)[None]
        return x.flatten(0, 1).index_select(0, self._flat).unflatten(0, self.index.shape)

    def put_(self, x: Tensor, values: Tensor) -> Tensor:
        """Write `values` [R, k, …] over the kept tokens of `x` [rows, tokens, …], contiguous, in place."""
        x.view(-1, *x.shape[2:]).index_copy_(0, self._flat, values.flatten(0, 1))
        return x

    def fill_(self, x: Tensor, value: float) -> None:
        """Write one number over the kept tokens of `x` [rows, tokens], contiguous, in place."""
        x.view(-1).index_fill_(0, self._flat, value)

    @cached_property
    def parts(self) -> tuple[tuple[slice, Tensor], ...]:
        """Slices of batch rows that keep equally many, and their token indices [rows, k]: for what mixes a row's tokens.

        Waits for the device where `counts` are not known.
        """
        if self._even:
            return ((slice(0, self.rows), self.index),)
        counts = self.counts or torch.bincount(self._row, minlength=self.rows).tolist()
        starts = [row for row in range(self.rows) if row == 0 or counts[row] != counts[row - 1]]
        places = (self.index[0] - self._row * self.tokens).split(counts)
        stops = [*starts[1:], self.rows]
        return tuple((slice(start, stop), torch.stack(places[start:stop])) for start, stop in zip(starts, stops))

    def together(self, values: Sequence[Tensor]) -> Tensor:
        """[R, k, …] of what was computed part by part, [rows, k, …] for each of `parts`."""
        return values[0] if self._even else torch.cat([part.flatten(0, 1) for part in values])[None]

    @property
    def _even(self) -> bool:
        return len(self.index) == self.rows

    @cached_property
    def _flat(self) -> Tensor:
        """Indices [K] into the tokens of all rows."""
        return (self.index + _first(self.rows, self.tokens, self.index.device)).flatten() if self._even else self.index[0]

    @cached_property
    def _row(self) -> Tensor:
        """The batch row [K] of each token, where they are counted through all rows."""
        return self.index[0] // self.tokens


def _first(rows: int, tokens: int, device: torch.device) -> Tensor:
    """The first token [rows, 1] of each row among those of all rows."""
    return torch.arange(0, rows * tokens, tokens, device=device)[:, None]
