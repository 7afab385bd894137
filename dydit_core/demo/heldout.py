"""Prompts of scenes that training never drew: their seeds are far from its own.

The scenes' language is small, so some are described alike all the same: of the first 64, 22 have the content (time,
ground, objects, extras) of one of the 20,480 training scenes, drawn with other details.
"""

from __future__ import annotations

import numpy as np

from .scenes import Scene, caption, random_scene

# Training seeds count up from 0; these are far above any of them.
FIRST_SEED = 1 << 40


def held_out(count: int) -> list[Scene]:
    """The first `count` held-out scenes: always the same, whatever `count` is."""
    return [random_scene(np.random.default_rng(FIRST_SEED + index)) for index in range(count)]


def held_out_prompts(count: int) -> list[str]:
    """The full caption of each held-out scene."""
    return [caption(scene, np.random.default_rng(FIRST_SEED + i)) for i, scene in enumerate(held_out(count))]
