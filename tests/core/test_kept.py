"""Kept tokens are taken out and put back, whether all rows keep equally many or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from dydit_core.kept import Kept

TOKENS = 10


def chosen(counts: tuple[int, ...]) -> tuple[Kept, Tensor]:
    """The highest of random scores, and the same as booleans [rows, tokens]."""
    torch.manual_seed(0)
    scores = torch.rand(len(counts), TOKENS)
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    for row, count in enumerate(counts):
        mask[row, scores[row].topk(count).indices] = True
    alike = [(slice(0, len(counts)), counts[0])] if len(set(counts)) == 1 else [(slice(row, row + 1), count) for row, count in enumerate(counts)]
    return Kept.best(scores, alike), mask


@pytest.mark.parametrize("counts", [(3, 3, 3), (0, 5, 2), (10, 0, 0), (2, 2, 7), (4,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_taking_and_putting_back(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    kept, mask = chosen(counts)
    rows = len(counts)
    x, per_row = torch.randn(rows, TOKENS + 2, 4)[:, 1:-1].to(dtype), torch.randn(rows, 1, 4).to(dtype)  # not contiguous, as a split is
    assert kept.count == sum(counts)
    assert kept.take(x).shape[:2] == kept.index.shape == ((rows, counts[0]) if len(set(counts)) == 1 else (1, sum(counts)))
    assert torch.equal(kept.take(x).flatten(0, 1), x[mask])
    assert torch.equal((kept.take(x) * kept.take(per_row)).flatten(0, 1), (x * per_row)[mask])
    assert torch.equal(kept.put_(torch.zeros_like(x).contiguous(), kept.take(x)), x * mask[..., None])
    filled = torch.zeros_like(mask)
    kept.fill_(filled, True)
    assert torch.equal(filled, mask)


@pytest.mark.parametrize("counts, slices", [((3, 3, 3), [3]), ((0, 5, 2), [1, 1, 1]), ((2, 2, 7), [2, 1])])
def test_parts_are_rows_that_keep_equally_many(counts: tuple[int, ...], slices: list[int]) -> None:
    kept, mask = chosen(counts)
    above = Kept.above(mask.float(), 0.5)
    x = torch.randn(len(counts), TOKENS, 4)
    for one in (kept, above):
        assert [rows.stop - rows.start for rows, _ in one.parts] == slices
        found = torch.zeros_like(mask)
        for rows, tokens in one.parts:
            found[rows] = found[rows].scatter(1, tokens, True)
            assert (tokens.diff(dim=1) > 0).all()
        assert torch.equal(found, mask)
        values = [torch.stack([row[some] for row, some in zip(x[rows], tokens)]) for rows, tokens in one.parts]
        assert torch.equal(one.together(values), one.take(x)), "in the order of `take`"
    assert above.counts is None and above.index.shape == (1, sum(counts))
