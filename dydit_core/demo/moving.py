"""Drawn videos: what the small Latte was trained on, by classes that say what moves and which way.

The camera sees a part of a demo picture, at its scale. Something moves by one image token (16 pixels) from each frame to the
next, and all else rests, which keeps the number of different tokens small (see `scenes`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .scenes import BASELINE, COLORS, GROUNDS, SCALE, TIMES, TOKEN, Scene, cloud, paint, sun_or_moon
from .shapes import DRAW, WHITE, Pen

FRAMES, SIDE = 8, 128
# Of the camera, in the picture: its left and top.
LEFT, TOP = 64, 96
_CENTER = LEFT + SIDE // 2

# Tokens to the right and down that something goes from a frame to the next.
Step = tuple[int, int]
EAST, WEST, UP, DOWN = (1, 0), (-1, 0), (0, -1), (0, 1)
_SEA, _LAND, _SUNNY = ("sea",), ("meadow", "desert", "snow"), ("day", "sunset")


@dataclass(frozen=True)
class Motion:
    """`what` goes by `step`, at one of `times` over one of `grounds`; half-way it is at `middle` (x, y in the picture), moved
    across by up to `aside` tokens. `behind`: the ground hides it."""

    what: str
    step: Step
    middle: tuple[int, int]
    aside: int = 0
    times: tuple[str, ...] = TIMES
    grounds: tuple[str, ...] = GROUNDS
    behind: bool = False


def _boat(step: Step) -> Motion:
    return Motion("sailboat", step, (_CENTER, BASELINE), grounds=_SEA)


def _flying(what: str, step: Step, grounds: tuple[str, ...] = GROUNDS) -> Motion:
    return Motion(what, step, (_CENTER, 256), aside=1, grounds=grounds)


def _sun(step: Step) -> Motion:
    return Motion("sun", step, (_CENTER, 144), aside=2, times=_SUNNY, behind=True)


def _clouds(step: Step) -> Motion:
    return Motion("clouds", step, (_CENTER, 136), aside=1, times=_SUNNY, behind=True)


# A class's number is its place here.
CLASSES: dict[str, Motion] = {
    "sailboat sails left": _boat(WEST),
    "sailboat sails right": _boat(EAST),
    "balloon rises": _flying("balloon", UP),
    "balloon sinks": _flying("balloon", DOWN),
    "rocket takes off": _flying("rocket", UP, _LAND),
    "sun rises": _sun(UP),
    "sun sets": _sun(DOWN),
    "clouds drift left": _clouds(WEST),
    "clouds drift right": _clouds(EAST),
    "snow falls": Motion("snow", DOWN, (_CENTER, TOP), times=("night",), grounds=_SEA, behind=True),
}
NAMES = tuple(CLASSES)


@dataclass(frozen=True)
class MovingScene:
    """`backdrop` rests; what `motion` names has this `color`, and is at `middle` in frame number `lead`."""

    backdrop: Scene
    motion: Motion
    color: str
    middle: tuple[int, int]
    lead: int

    def place(self, frame: int) -> tuple[int, int]:
        """Where (x, y in the picture) it is in a frame."""
        x, y = (at + TOKEN * step * (frame - self.lead) for at, step in zip(self.middle, self.motion.step))
        return x, y


def moving_scene(index: int) -> tuple[MovingScene, int]:
    """Moving scene number `index` and its class; the classes take turns."""
    rng, label = np.random.default_rng(index), index % len(CLASSES)
    motion = CLASSES[NAMES[label]]
    time, ground = str(rng.choice(motion.times)), str(rng.choice(motion.grounds))
    aside = TOKEN * int(rng.integers(-motion.aside, motion.aside + 1))
    middle = tuple(at + aside * (step == 0) for at, step in zip(motion.middle, motion.step))
    extras = ("stars",) if time == "night" and motion.what != "snow" else ()
    backdrop = Scene(time, ground, (), extras, int(rng.integers(1 << 31)))
    return MovingScene(backdrop, motion, str(rng.choice(list(COLORS))), middle, FRAMES // 2 - int(rng.integers(2))), label


def frame(scene: MovingScene, number: int) -> Image.Image:
    """Frame `number` as an RGB picture of 128 × 128 pixels; the same scene, the same picture."""
    def moved(pen: Pen) -> None:
        _MOVERS.get(scene.motion.what, _thing)(pen, scene, *scene.place(number))

    picture = paint(scene.backdrop, behind=moved) if scene.motion.behind else paint(scene.backdrop, before=moved)
    camera = LEFT, TOP, LEFT + SIDE, TOP + SIDE
    return picture.resize((SIDE, SIDE), Image.Resampling.BOX, tuple(SCALE * edge for edge in camera))


def film(scenes: list[MovingScene]) -> Tensor:
    """Frames [scenes, 8, 3, 128, 128] in 0…1."""
    pixels = np.stack([[np.asarray(frame(scene, number)) for number in range(FRAMES)] for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 1, 4, 2, 3).float() / 255


def _thing(pen: Pen, scene: MovingScene, x: int, y: int) -> None:
    DRAW[scene.motion.what](pen, x, y, COLORS[scene.color])


def _sun_at(pen: Pen, scene: MovingScene, x: int, y: int) -> None:
    sun_or_moon(pen, scene.backdrop.time, "sun", x, y)


def _clouds_at(pen: Pen, scene: MovingScene, x: int, y: int) -> None:
    """Six tokens apart, by turns higher and lower."""
    for number in range(-1, 2):
        cloud(pen, scene.backdrop.time, x + 6 * TOKEN * number, y + TOKEN * (number % 2))


def _snow_at(pen: Pen, scene: MovingScene, x: int, y: int) -> None:
    """In each column of tokens a flake in every third, begun anywhere."""
    first = y // TOKEN % 3 - 3
    for column, begun in enumerate(np.random.default_rng(scene.backdrop.seed).integers(3, size=SIDE // TOKEN)):
        for row in range(first + int(begun), SIDE // TOKEN, 3):
            pen.glow(LEFT + TOKEN * column + 8, TOP + TOKEN * row + 8, 3.5, WHITE)


_MOVERS: dict[str, Callable[[Pen, MovingScene, int, int], None]] = {"sun": _sun_at, "clouds": _clouds_at, "snow": _snow_at}
