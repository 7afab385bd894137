"""Classes of drawn scenes: what the class-conditional demo models can be asked for by number.

A class fixes what its pictures show; colours, places, time of day and sky vary as far as it leaves them free.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .checker import NONE, Checker
from .scenes import COLORS, GROUNDS, KINDS, PLACES, TIMES, Scene, Thing


@dataclass(frozen=True)
class Motif:
    """`count` objects of one `kind` and nothing else, at one of `times`, on one of `grounds`, with all of `extras` in the sky."""

    kind: str | None = None
    count: int = 1
    times: tuple[str, ...] = TIMES
    grounds: tuple[str, ...] = GROUNDS
    extras: tuple[str, ...] = ()


SEA = ("sea",)
# A class's number is its place here.
CLASSES: dict[str, Motif] = {
    **{kind: Motif(kind, grounds=SEA if kind == "sailboat" else GROUNDS) for kind in KINDS},
    "village": Motif("house", 3),
    "forest": Motif("tree", 3),
    "flower garden": Motif("flower", 3),
    "regatta": Motif("sailboat", 3, grounds=SEA),
    "sun over the sea": Motif(None, 0, times=("day", "sunset"), grounds=SEA, extras=("sun",)),
    "moonlit night": Motif(None, 0, times=("night",), extras=("moon", "stars")),
}
NAMES = tuple(CLASSES)
# What else hangs in the sky, where the class does not say.
_LIKELY = {"day": ("sun", "clouds"), "sunset": ("sun", "clouds"), "night": ("moon", "stars"), "storm": ("clouds",)}


def class_scene(index: int) -> tuple[Scene, int]:
    """Scene number `index` and its class; the classes take turns."""
    rng, label = np.random.default_rng(index), index % len(CLASSES)
    motif = CLASSES[NAMES[label]]
    time, ground = str(rng.choice(motif.times)), str(rng.choice(motif.grounds))
    places, colors = rng.permutation(PLACES)[: motif.count], rng.choice(list(COLORS), motif.count)
    things = tuple(Thing(str(motif.kind), str(color), str(place)) for place, color in zip(places, colors))
    extras = tuple(extra for extra in _LIKELY[time] if extra in motif.extras or rng.random() < 0.5)
    return Scene(time, ground, things, extras, int(rng.integers(1 << 31))), label


@torch.no_grad()
def recognized(images: Tensor, labels: Tensor, checker: Checker) -> Tensor:
    """Whether each of `images` [n, 3, 256, 256] shows its class of `labels` [n]: its objects, no other, at its times and on its
    grounds; booleans [n]. The checker does not look at the sky."""
    answers = torch.cat([torch.stack([head.argmax(1) for head in checker(rows)], 1) for rows in images.split(32)])
    return torch.tensor([_shows(CLASSES[NAMES[label]], answer) for label, answer in zip(labels.tolist(), answers.tolist())])


def _shows(motif: Motif, answer: list[int]) -> bool:
    """`answer`: what the checker says of time, ground, then kind and colour for each place."""
    time, ground, found = answer[0], answer[1], [kind for kind in answer[2::2] if kind != NONE]
    kinds = [KINDS.index(motif.kind)] * motif.count if motif.kind else []
    return found == kinds and TIMES[time] in motif.times and GROUNDS[ground] in motif.grounds
