"""Small charts drawn with Pillow, for nodes and the command line."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_INK, _FAINT, _PAPER = "#1d2733", "#d5dbe1", "#ffffff"
# One colour for each series: those of Okabe and Ito, told apart with every kind of colour vision, but a deeper blue first (a
# single series has it) and grey in place of their yellow, which is too faint on white.
COLOURS = ("#00448f", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#8a8a8a")
_FINER = 2  # drawn so many times larger and scaled down: Pillow's lines have hard edges


@dataclass(frozen=True)
class Point:
    x: float
    y: float
    label: str


@dataclass(frozen=True)
class Series:
    """Points that one line joins, in the order of x."""

    name: str
    points: Sequence[Point]


@dataclass(frozen=True)
class Axis:
    """`title` with its unit; the axis spans `low` to `high`."""

    title: str
    low: float
    high: float

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers on the axis, at most `most` of them and one."""
        step = 10 ** math.floor(math.log10((self.high - self.low) / most))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= most)
        return [round(index * step, 10) for index in range(math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9) + 1)]

    def at(self, value: float) -> float:
        """Place of `value`, 0 to 1."""
        return (value - self.low) / (self.high - self.low)


def around(title: str, values: Sequence[float], zero: bool = False) -> Axis:
    """An axis with room around `values`; from 0 on where `zero`."""
    low, high = (0.0 if zero else min(values)), max(values)
    room = 0.12 * ((high - low) or abs(high) or 1.0)
    return Axis(title, low if zero else low - room, high + room)


def scatter(title: str, x: Axis, y: Axis, points: Sequence[Point], size: tuple[int, int] = (720, 480)) -> Image.Image:
    """The `points`, joined in the order of x, each with its label."""
    return lines(title, x, y, [Series("", points)], size)


def lines(title: str, x: Axis, y: Axis, series: Sequence[Series], size: tuple[int, int] = (960, 540), dots: bool = True
          ) -> Image.Image:
    """Each series in its colour, at most as many as there are `COLOURS`; their names, where they have any, on the right.
    Points are marked and labelled where `dots`."""
    small, large = (ImageFont.load_default(_FINER * points) for points in (13, 16))
    legend = max((small.getlength(one.name) + _FINER * 40 for one in series if one.name), default=0)
    width, height = (_FINER * side for side in size)
    left, right, top, bottom = (_FINER * margin for margin in (76, 24, 48, 64))
    right += int(legend)
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)

    def place(point_x: float, point_y: float) -> tuple[float, float]:
        return left + x.at(point_x) * (width - left - right), height - bottom - y.at(point_y) * (height - top - bottom)

    for tick in x.ticks():
        draw.line([place(tick, y.low), place(tick, y.high)], _FAINT, _FINER)
        draw.text((place(tick, y.low)[0], height - bottom + 6 * _FINER), f"{tick:g}", _INK, small, anchor="ma")
    for tick in y.ticks():
        draw.line([place(x.low, tick), place(x.high, tick)], _FAINT, _FINER)
        draw.text((left - 8 * _FINER, place(x.low, tick)[1]), f"{tick:g}", _INK, small, anchor="rm")
    draw.line([place(x.low, y.high), place(x.low, y.low), place(x.high, y.low)], _INK, _FINER)
    draw.text((left, 14 * _FINER), title, _INK, large)
    draw.text(((left + width - right) / 2, height - 12 * _FINER), x.title, _INK, small, anchor="md")
    _upright(image, y.title, small, (10 * _FINER, (top + height - bottom) // 2))

    for number, (one, colour) in enumerate(zip(series, COLOURS)):
        points = sorted(one.points, key=lambda point: point.x)
        draw.line([place(point.x, point.y) for point in points], colour, _FINER)
        for point in points if dots else ():
            _dot(draw, place(point.x, point.y), colour)
            draw.text((place(point.x, point.y)[0] + 9 * _FINER, place(point.x, point.y)[1] + 3 * _FINER), point.label, _INK, small)
        if one.name:
            at = width - right + 18 * _FINER, top + (10 + 22 * number) * _FINER
            _dot(draw, at, colour)
            draw.text((at[0] + 12 * _FINER, at[1]), one.name, _INK, small, anchor="lm")
    return image.resize(size, Image.Resampling.LANCZOS)


def _dot(draw: ImageDraw.ImageDraw, at: tuple[float, float], colour: str) -> None:
    radius = 5 * _FINER
    draw.ellipse([at[0] - radius, at[1] - radius, at[0] + radius, at[1] + radius], colour)


def _upright(image: Image.Image, text: str, font: ImageFont.FreeTypeFont, middle_left: tuple[int, int]) -> None:
    """Text that reads from the bottom up."""
    _, _, width, height = font.getbbox(text)
    strip = Image.new("RGB", (int(width) + 2, int(height) + 4), _PAPER)
    ImageDraw.Draw(strip).text((0, 0), text, _INK, font)
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (middle_left[0], middle_left[1] - turned.height // 2))
