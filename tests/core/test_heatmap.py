"""Every token of a map fills its own pixels."""

from __future__ import annotations

import pytest
import torch

from dydit_core.colours import cividis
from dydit_core.heatmap import paint, spread


def test_each_token_is_a_square() -> None:
    shown = torch.tensor([[0.0, 0.25], [0.5, 1.0]])
    values = spread(shown, (2, 2), (2.0, 2.0), (32, 48))
    assert values.shape == (32, 48)
    assert torch.equal(values, shown.repeat_interleave(16, 0).repeat_interleave(24, 1))


def test_a_token_that_hangs_over_the_edge_is_cut_there() -> None:
    """A latent 5 high has 3 rows of tokens; the last is half outside the picture."""
    rows = spread(torch.tensor([[0.1], [0.2], [0.3]]), (3, 1), (2.5, 1.0), (40, 1))[:, 0]
    assert rows.tolist() == pytest.approx([0.1] * 16 + [0.2] * 16 + [0.3] * 8)


def test_a_cell_of_several_tokens_covers_them() -> None:
    """96 tokens in 64 cells: cells hold one token and two in turn, as the trace cut them."""
    column = spread(torch.arange(64.0)[:, None], (96, 1), (96.0, 1.0), (96, 1))[:, 0]
    assert column[:6].tolist() == [0, 1, 1, 2, 3, 3] and column[-1] == 63


def test_the_map_lies_over_the_picture() -> None:
    values, pictures = torch.tensor([[[0.0, 1.0]]]), torch.rand(3, 1, 2, 4)
    assert torch.equal(paint(values), cividis(values))
    red, green, blue = pictures[..., :3].unbind(-1)
    grey = (0.2126 * red + 0.7152 * green + 0.0722 * blue)[..., None]
    assert torch.allclose(paint(values, pictures, 0.25), 0.75 * grey + 0.25 * cividis(values))
    assert torch.allclose(paint(values, pictures, 0.0), grey.expand(3, 1, 2, 3))


def test_each_frame_has_a_map_of_its_own() -> None:
    """Of two videos of three frames, which follow one another."""
    shown = torch.rand(3, 2, 2, generator=torch.Generator().manual_seed(0))
    values = spread(shown, (2, 2), (2.0, 2.0), (4, 6))
    assert all(torch.equal(frame, spread(one, (2, 2), (2.0, 2.0), (4, 6))) for frame, one in zip(values, shown, strict=True))
    pictures = torch.rand(6, 4, 6, 3)
    painted = paint(values, pictures, 0.5)
    for index, picture in enumerate(painted):
        assert torch.equal(picture, paint(values[[index % 3]], pictures[[index]], 0.5)[0])
