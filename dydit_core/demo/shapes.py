"""The eight things a demo scene can hold, each drawn as a bold silhouette.

All coordinates are in pixels of a 256 × 256 picture. `x, y` is the middle of the foot of an object, so that
every object stands on its `y`; the two that fly hang in the air above it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import ImageDraw

Rgb = tuple[int, int, int]

WHITE: Rgb = (246, 246, 242)
DARK: Rgb = (52, 44, 50)
BROWN: Rgb = (112, 74, 46)
STONE: Rgb = (120, 124, 134)
LEAF: Rgb = (58, 140, 62)
LAMP: Rgb = (255, 226, 120)
FLAME: Rgb = (255, 150, 40)


def mix(a: Rgb, b: Rgb, share: float) -> Rgb:
    """`a` with `share` (0…1) of it replaced by `b`."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b))  # type: ignore[return-value]


@dataclass(frozen=True)
class Pen:
    """Draws in 256-pixel units on a canvas `scale` times as large; `light` colours what it draws."""

    draw: ImageDraw.ImageDraw
    scale: int
    light: Callable[[Rgb], Rgb]

    def polygon(self, points: list[tuple[float, float]], color: Rgb) -> None:
        self.draw.polygon([(px * self.scale, py * self.scale) for px, py in points], fill=self.light(color))

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Rgb) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], color)

    def oval(self, x: float, y: float, rx: float, ry: float, color: Rgb) -> None:
        s = self.scale
        self.draw.ellipse([(x - rx) * s, (y - ry) * s, (x + rx) * s, (y + ry) * s], fill=self.light(color))

    def glow(self, x: float, y: float, radius: float, color: Rgb) -> None:
        """A disc that shines by itself: its colour does not depend on the time of day."""
        Pen(self.draw, self.scale, lambda rgb: rgb).oval(x, y, radius, radius, color)

    def lamp(self, x0: float, y0: float, x1: float, y1: float) -> None:
        """A lit window: like `glow`, but a box."""
        Pen(self.draw, self.scale, lambda rgb: rgb).box(x0, y0, x1, y1, LAMP)


def house(pen: Pen, x: float, y: float, color: Rgb) -> None:
    pen.box(x + 10, y - 76, x + 20, y - 50, BROWN)
    pen.box(x - 28, y - 44, x + 28, y, color)
    pen.box(x + 12, y - 44, x + 28, y, mix(color, DARK, 0.22))
    pen.polygon([(x - 36, y - 42), (x, y - 78), (x + 36, y - 42)], DARK)
    pen.box(x - 6, y - 24, x + 7, y, BROWN)
    pen.lamp(x - 23, y - 34, x - 11, y - 22)
    pen.lamp(x + 13, y - 34, x + 24, y - 22)


def castle(pen: Pen, x: float, y: float, color: Rgb) -> None:
    shade = mix(color, DARK, 0.25)
    pen.box(x - 24, y - 48, x + 24, y, color)
    for left in (-20, -4, 12):
        pen.box(x + left, y - 57, x + left + 8, y - 47, color)
    for center in (-28, 28):
        pen.box(x + center - 10, y - 72, x + center + 10, y, shade)
        pen.polygon([(x + center - 14, y - 70), (x + center, y - 104), (x + center + 14, y - 70)], DARK)
        pen.lamp(x + center - 4, y - 58, x + center + 4, y - 44)
    pen.oval(x, y - 20, 10, 10, DARK)
    pen.box(x - 10, y - 20, x + 10, y, DARK)


def tree(pen: Pen, x: float, y: float, color: Rgb) -> None:
    pen.polygon([(x - 10, y), (x - 6, y - 46), (x + 6, y - 46), (x + 10, y)], BROWN)
    shade = mix(color, DARK, 0.25)
    for dx, dy, radius in ((15, -52, 19), (-17, -52, 19), (3, -76, 23)):
        pen.oval(x + dx, y + dy, radius, radius, shade)
    for dx, dy, radius in ((11, -55, 15), (-19, -55, 16), (0, -79, 20), (-4, -60, 16)):
        pen.oval(x + dx, y + dy, radius, radius, color)


def flower(pen: Pen, x: float, y: float, color: Rgb) -> None:
    pen.box(x - 4, y - 56, x + 4, y, LEAF)
    pen.polygon([(x, y - 4), (x - 30, y - 30), (x - 8, y - 32)], LEAF)
    pen.polygon([(x, y - 4), (x + 30, y - 30), (x + 8, y - 32)], LEAF)
    for dx, dy in ((0, -24), (21, -12), (21, 12), (0, 24), (-21, 12), (-21, -12)):
        pen.oval(x + dx, y - 72 + dy, 14, 14, color)
    pen.oval(x, y - 72, 14, 14, BROWN)
    pen.oval(x - 2, y - 74, 7, 7, FLAME)


def lighthouse(pen: Pen, x: float, y: float, color: Rgb) -> None:
    band = STONE if color == WHITE else WHITE
    for level in range(4):
        low, high = 20 - 2.5 * level, 17.5 - 2.5 * level
        top = y - 20 * (level + 1)
        points = [(x - low, top + 20), (x - high, top), (x + high, top), (x + low, top + 20)]
        pen.polygon(points, color if level % 2 == 0 else band)
    pen.box(x - 16, y - 86, x + 16, y - 79, DARK)
    pen.lamp(x - 9, y - 100, x + 9, y - 86)
    pen.polygon([(x - 14, y - 99), (x, y - 116), (x + 14, y - 99)], color)


def sailboat(pen: Pen, x: float, y: float, color: Rgb) -> None:
    pen.box(x - 3, y - 92, x + 3, y - 18, BROWN)
    pen.polygon([(x + 5, y - 90), (x + 36, y - 26), (x + 5, y - 26)], color)
    pen.polygon([(x - 5, y - 80), (x - 5, y - 26), (x - 30, y - 26)], mix(color, WHITE, 0.55))
    pen.polygon([(x - 38, y - 20), (x + 38, y - 20), (x + 26, y), (x - 26, y)], BROWN)
    pen.box(x - 36, y - 20, x + 36, y - 15, WHITE)


def balloon(pen: Pen, x: float, y: float, color: Rgb) -> None:
    top = y - 150
    light = mix(color, STONE if color == WHITE else WHITE, 0.6)
    pen.polygon([(x - 27, top + 46), (x + 27, top + 46), (x + 10, top + 78), (x - 10, top + 78)], color)
    pen.oval(x, top + 34, 34, 34, color)
    pen.polygon([(x - 10, top + 46), (x + 10, top + 46), (x + 4, top + 78), (x - 4, top + 78)], light)
    pen.oval(x, top + 34, 13, 34, light)
    pen.box(x - 11, top + 84, x + 11, top + 102, BROWN)
    pen.box(x - 11, top + 78, x - 7, top + 84, DARK)
    pen.box(x + 7, top + 78, x + 11, top + 84, DARK)


def rocket(pen: Pen, x: float, y: float, color: Rgb) -> None:
    top = y - 150
    flame = Pen(pen.draw, pen.scale, lambda rgb: rgb)
    flame.polygon([(x - 12, top + 80), (x + 12, top + 80), (x, top + 112)], FLAME)
    flame.polygon([(x - 6, top + 80), (x + 6, top + 80), (x, top + 98)], LAMP)
    shade = mix(color, DARK, 0.45)
    pen.polygon([(x - 14, top + 46), (x - 32, top + 84), (x - 12, top + 78)], shade)
    pen.polygon([(x + 14, top + 46), (x + 32, top + 84), (x + 12, top + 78)], shade)
    pen.box(x - 16, top + 34, x + 16, top + 80, color)
    pen.polygon([(x - 16, top + 35), (x - 11, top + 16), (x, top), (x + 11, top + 16), (x + 16, top + 35)], WHITE)
    pen.oval(x, top + 50, 9, 9, DARK)
    pen.glow(x, top + 50, 5.5, LAMP)


DRAW: dict[str, Callable[[Pen, float, float, Rgb], None]] = {
    "house": house,
    "castle": castle,
    "tree": tree,
    "sailboat": sailboat,
    "balloon": balloon,
    "rocket": rocket,
    "flower": flower,
    "lighthouse": lighthouse,
}
FLYING = frozenset({"balloon", "rocket"})
