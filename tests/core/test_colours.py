"""The one scale of colours, in Python and in the browser."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from dydit_core.colours import _CIVIDIS, cividis

SCRIPT = Path(__file__).parents[2] / "web" / "heatmap.js"


def test_the_browser_has_the_same_table() -> None:
    table = re.search(r"CIVIDIS_HEX =\s*(.*?)\n\n", SCRIPT.read_text(), re.DOTALL).group(1)
    assert "".join(re.findall(r"[0-9a-f]{50,}", table)) == bytes((_CIVIDIS * 255).round().byte().flatten().tolist()).hex()


def test_ends_middle_and_beyond() -> None:
    colours = (cividis(torch.tensor([[-1.0, 0.0], [1.0, 7.0]])) * 255).round().int().tolist()
    assert colours == [[[0, 34, 78]] * 2, [[254, 232, 56]] * 2]
    between = cividis(torch.tensor([2.25 / 51]))[0]
    torch.testing.assert_close(between, 0.75 * _CIVIDIS[2] + 0.25 * _CIVIDIS[3])


def test_brighter_is_more() -> None:
    luminance = cividis(torch.linspace(0, 1, 500)) @ torch.tensor([0.2126, 0.7152, 0.0722])
    assert (luminance.diff() > 0).all()
