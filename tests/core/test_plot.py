"""Charts and contact sheets: ticks are round, dots are where their numbers say, nothing is drawn over."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageColor

from dydit_core.plot import COLOURS, Axis, Point, Series, around, lines, scatter
from dydit_core.sheet import contact_sheet

DOT = (0, 0x44, 0x8F)


@pytest.mark.parametrize("low, high, expected", [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (23.2, 45.9, [25, 30, 35, 40, 45]), (0, 0.012, [0, 0.002, 0.004, 0.006, 0.008, 0.01, 0.012])])
def test_ticks_are_round_numbers_on_the_axis(low: float, high: float, expected: list[float]) -> None:
    assert Axis("", low, high).ticks() == pytest.approx(expected)


def test_an_axis_has_room_for_one_value_and_for_many() -> None:
    assert around("", [5.0]).low < 5.0 < around("", [5.0]).high
    assert around("", [0.0, 0.0]).low < around("", [0.0, 0.0]).high
    assert around("", [2.0, 4.0], zero=True).low == 0.0


def test_dots_are_where_their_numbers_say() -> None:
    x, y = Axis("s", 0.0, 10.0), Axis("dB", 0.0, 10.0)
    picture = np.asarray(scatter("t", x, y, [Point(2.0, 8.0, ""), Point(7.0, 1.0, "")], size=(720, 480)))
    for at_x, at_y in ((2.0, 8.0), (7.0, 1.0)):
        column, row = 76 + at_x / 10 * (720 - 100), 480 - 64 - at_y / 10 * (480 - 112)
        assert np.abs(picture[round(row), round(column)].astype(int) - DOT).max() < 30
    assert np.asarray(scatter("t", x, y, [])).shape == (480, 720, 3)


def test_each_series_has_its_colour_and_its_name_beside() -> None:
    x, y = Axis("s", 0.0, 10.0), Axis("dB", 0.0, 10.0)
    named = [Series(name, [Point(2.0, at, ""), Point(8.0, at, "")]) for name, at in (("one", 2.0), ("another", 7.0))]
    picture = np.asarray(lines("t", x, y, named, size=(720, 480))).astype(int)
    for colour in COLOURS[:2]:
        rows, columns = np.nonzero(np.abs(picture - ImageColor.getrgb(colour)).max(-1) < 8)
        assert columns.max() > 600, "the dot of the legend"
        assert np.ptp(rows[columns < 590]) <= 12, "one height"
    assert (np.asarray(lines("t", x, y, named)) != np.asarray(lines("t", x, y, named[::-1]))).any()


@pytest.mark.parametrize("count, rows, columns", [(1, 1, 1), (4, 2, 2), (5, 2, 3)])
def test_pictures_lie_side_by_side(count: int, rows: int, columns: int) -> None:
    pictures = [Image.new("RGB", (100, 50), (10 * index, 0, 0)) for index in range(count)]
    sheet = np.asarray(contact_sheet(pictures, [["a", "b"]] * count))
    line = 2 * 20 + 8
    assert sheet.shape[:2] == (12 + rows * (50 + line + 12), 12 + columns * (100 + 12))
    for index in range(count):
        y, x = 12 + index // columns * (50 + line + 12), 12 + index % columns * 112
        assert (sheet[y:y + 50, x:x + 100] == (10 * index, 0, 0)).all()


def test_large_pictures_are_scaled_down_and_long_captions_have_room() -> None:
    sheet = contact_sheet([Image.new("RGB", (1024, 512))], [["x" * 80]])
    assert sheet.width > 400 and sheet.height == 12 + 160 + 28 + 12
