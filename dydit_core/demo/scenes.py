"""Procedurally drawn scenes: what the demo model was trained on, and what its prompts can ask for.

A `Scene` is a time of day, a ground, one to three objects and optional things in the sky. Each of the three places
is one exact spot and everything that wanders moves by whole image tokens (16 pixels), which keeps the number of
different tokens small: that is why a model trained for an hour on two CPU cores can draw them with sharp edges.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes import BROWN, DRAW, FLYING, STONE, WHITE, Pen, Rgb, mix

TIMES = ("day", "sunset", "night", "storm")
GROUNDS = ("meadow", "desert", "snow", "sea")
KINDS = tuple(DRAW)
COLORS: dict[str, Rgb] = {
    "red": (212, 38, 40),
    "orange": (250, 138, 20),
    "yellow": (252, 218, 48),
    "green": (30, 150, 66),
    "blue": (36, 92, 220),
    "purple": (132, 56, 186),
    "pink": (250, 136, 186),
    "white": WHITE,
}
PLACES = ("left", "center", "right")
EXTRAS = ("sun", "moon", "stars", "clouds")

SIZE = 256
TOKEN = 16
PLACE_X = {"left": 48, "center": 128, "right": 208}
HORIZON = 176
BASELINE = 216
SCALE = 3  # of what is drawn and then averaged
SKY_LINE = 40  # where what hangs in the sky hangs

Layer = Callable[[Pen], None]

SKY: dict[str, tuple[Rgb, Rgb]] = {
    "day": ((64, 150, 236), (184, 224, 250)),
    "sunset": ((104, 66, 140), (252, 160, 92)),
    "night": ((10, 14, 44), (38, 50, 104)),
    "storm": ((62, 70, 80), (134, 142, 148)),
}
# (far, near) colours of the ground in daylight.
GROUND: dict[str, tuple[Rgb, Rgb]] = {
    "meadow": ((70, 138, 84), (112, 186, 78)),
    "desert": ((196, 142, 84), (234, 190, 118)),
    "snow": ((178, 200, 222), (238, 244, 250)),
    "sea": ((30, 104, 166), (24, 84, 146)),
}
# Light of the hour: (colour everything drifts to, how far).
LIGHT: dict[str, tuple[Rgb, float]] = {
    "day": ((255, 255, 255), 0.0),
    "sunset": ((190, 84, 70), 0.20),
    "night": ((12, 16, 56), 0.36),
    "storm": ((70, 78, 88), 0.24),
}


@dataclass(frozen=True)
class Thing:
    """One object: what, in which colour, at which of the three places."""

    kind: str
    color: str
    place: str


@dataclass(frozen=True)
class Scene:
    """Everything `render` needs; `seed` decides the hills, the waves and where the sky things hang."""

    time: str
    ground: str
    things: tuple[Thing, ...]
    extras: tuple[str, ...] = ()
    seed: int = 0

    def at(self, place: str) -> Thing | None:
        return next((thing for thing in self.things if thing.place == place), None)


def random_scene(rng: np.random.Generator) -> Scene:
    """Draw a scene: every attribute uniform, except that boats mostly sail and that suns do not shine at night."""
    time, ground = str(rng.choice(TIMES)), str(rng.choice(GROUNDS))
    count = int(rng.choice((1, 2, 3), p=(0.46, 0.46, 0.08)))
    places = rng.permutation(PLACES)[:count]
    kinds = rng.permutation(KINDS)[:count]
    colors = rng.choice(list(COLORS), count)
    things = tuple(Thing(str(kind), str(color), str(place)) for kind, color, place in zip(kinds, colors, places))
    if "sailboat" in kinds and rng.random() < 0.6:
        ground = "sea"
    likely = {"day": ("sun", "clouds"), "sunset": ("sun", "clouds"), "night": ("moon", "stars"), "storm": ("clouds",)}
    extras = tuple(extra for extra in likely[time] if rng.random() < 0.5)
    return Scene(time, ground, things, extras, int(rng.integers(1 << 31)))


def caption(scene: Scene, rng: np.random.Generator, detail: float = 1.0) -> str:
    """Say the scene in words; order and wording vary with `rng`. Each attribute is told with chance `detail`."""
    phrases = []
    for thing in scene.things:
        color = f"{thing.color} " if rng.random() < detail else ""
        where = "in the center" if thing.place == "center" else f"on the {thing.place}"
        place = f" {where}" if rng.random() < detail else ""
        article = "an" if color.startswith("orange") else "a"
        phrases.append(f"{article} {color}{thing.kind}{place}")
    rng.shuffle(phrases)
    setting = [word for word in (scene.time, scene.ground, *scene.extras) if rng.random() < detail]
    if rng.random() < 0.5:
        rng.shuffle(setting)
    return ", ".join([" and ".join(phrases), *setting])


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """Draw the scene as an RGB picture of `size` × `size` pixels, antialiased; the same scene, the same picture."""
    return paint(scene).resize((size, size), Image.Resampling.BOX if size == SIZE else Image.Resampling.LANCZOS)


def paint(scene: Scene, behind: Layer = lambda pen: None, before: Layer = lambda pen: None) -> Image.Image:
    """The scene, not antialiased yet, `SCALE` times as large; `behind` draws between its sky and its ground, `before` at last."""
    rng = np.random.default_rng(scene.seed)
    image = _sky(scene.time, SIZE * SCALE)
    target, share = LIGHT[scene.time]
    pen = Pen(ImageDraw.Draw(image), SCALE, lambda rgb: mix(rgb, target, share))
    _sky_things(pen, scene, rng)
    behind(pen)
    _ground(pen, scene, rng)
    for thing in sorted(scene.things, key=lambda thing: PLACES.index(thing.place)):
        _thing(pen, scene, thing)
    before(pen)
    return image


def _sky(time: str, pixels: int) -> Image.Image:
    top, bottom = (np.array(color, dtype=np.float32) for color in SKY[time])
    fade = np.linspace(0, SIZE / HORIZON, pixels, dtype=np.float32)[:, None].clip(0, 1)
    column = (top + (bottom - top) * fade).round().astype(np.uint8)
    return Image.fromarray(np.repeat(column[:, None], pixels, axis=1))


def _sky_things(pen: Pen, scene: Scene, rng: np.random.Generator) -> None:
    """Stars on the token grid; then sun, moon and clouds in the top corners that no flying object needs."""
    if "stars" in scene.extras:
        cells = rng.permutation(16 * 9)[:22]
        for cell in cells:
            x, y = (int(cell) % 16) * TOKEN + 8, (int(cell) // 16) * TOKEN + 8
            pen.glow(x, y, 2.6, (250, 244, 214))
    taken = {thing.place for thing in scene.things if thing.kind in FLYING}
    free = [place for place in PLACES if place not in taken]
    rng.shuffle(free)
    light = next((extra for extra in ("sun", "moon") if extra in scene.extras), None)
    if light and free:
        sun_or_moon(pen, scene.time, light, PLACE_X[free.pop()] + TOKEN * int(rng.integers(-1, 2)), SKY_LINE)
    if "clouds" in scene.extras:
        for place in free[: 1 + int(rng.integers(2))]:
            x = PLACE_X[place] + TOKEN * int(rng.integers(-1, 2))
            cloud(pen, scene.time, x, SKY_LINE + TOKEN * int(rng.integers(2)))


def sun_or_moon(pen: Pen, time: str, which: str, x: int, y: int) -> None:
    if which == "sun":
        pen.glow(x, y, 21, (255, 232, 96) if time == "day" else (255, 236, 170))
        return
    pen.glow(x, y, 20, (244, 240, 214))
    for dx, dy, radius in ((-7, -6, 5), (6, 2, 6), (-4, 9, 4)):
        pen.glow(x + dx, y + dy, radius, (208, 204, 184))


def cloud(pen: Pen, time: str, x: int, y: int) -> None:
    color = {"storm": (92, 98, 106), "night": (96, 104, 140), "sunset": (250, 196, 170)}.get(time, WHITE)
    plain = Pen(pen.draw, pen.scale, lambda rgb: rgb)
    for dx, dy, rx, ry in ((-16, 0, 16, 11), (0, -8, 17, 15), (17, 0, 15, 10)):
        plain.oval(x + dx, y + dy, rx, ry, color)
    plain.box(x - 16, y, x + 17, y + 11, color)


def _ground(pen: Pen, scene: Scene, rng: np.random.Generator) -> None:
    far, near = GROUND[scene.ground]
    if scene.ground == "sea":
        pen.box(0, HORIZON, SIZE, SIZE, near)
        pen.box(0, HORIZON, SIZE, HORIZON + 8, far)
        for cell in rng.permutation(16 * 4)[:7]:
            x, y = (int(cell) % 16) * TOKEN, HORIZON + 12 + (int(cell) // 16) * TOKEN
            pen.box(x, y, x + 18, y + 3, mix(near, WHITE, 0.38))
        return
    wave = {"meadow": (9, 150), "desert": (11, 230), "snow": (7, 190)}[scene.ground]
    for color, level in ((far, HORIZON - 12), (near, HORIZON + 8)):
        _ridge(pen, color, level, *wave, phase=int(rng.integers(8)) / 8)


def _ridge(pen: Pen, color: Rgb, level: float, height: float, length: float, phase: float) -> None:
    """Fill everything below a sine of `height` and `length` pixels around `level`."""
    line = [(x, level - height * math.sin(2 * math.pi * (x / length + phase))) for x in range(0, SIZE + 1, 4)]
    pen.polygon([(0, SIZE), *line, (SIZE, SIZE)], color)


def _thing(pen: Pen, scene: Scene, thing: Thing) -> None:
    x, y = PLACE_X[thing.place], BASELINE
    if thing.kind in FLYING:
        DRAW[thing.kind](pen, x, y - 24, COLORS[thing.color])
        return
    if scene.ground == "sea" and thing.kind != "sailboat":
        pen.oval(x, y + 2, 42, 12, mix(GROUND["desert"][1], BROWN, 0.12))
    elif scene.ground != "sea" and thing.kind == "sailboat":
        pen.oval(x, y, 46, 11, mix(GROUND["sea"][0], STONE, 0.15))
    DRAW[thing.kind](pen, x, y, COLORS[thing.color])
