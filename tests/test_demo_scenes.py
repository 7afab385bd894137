import numpy as np
import pytest

from dydit_core.demo.heldout import held_out
from dydit_core.demo.scenes import COLORS, KINDS, SIZE, Scene, Thing, caption, random_scene, render


def pixels(scene: Scene) -> np.ndarray:
    return np.asarray(render(scene)).astype(int)


def test_a_scene_is_always_drawn_the_same() -> None:
    scene = random_scene(np.random.default_rng(3))
    first = pixels(scene)
    assert first.shape == (SIZE, SIZE, 3)
    assert (first == pixels(scene)).all()


def test_the_seed_moves_only_the_surroundings() -> None:
    thing = (Thing("house", "red", "center"),)
    first, second = (pixels(Scene("day", "meadow", thing, seed=seed)) for seed in (1, 2))
    body = (slice(176, 190), slice(102, 115))
    assert (first != second).any()
    assert (first[body] == second[body]).all()


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_shows_its_color_at_its_place(kind: str) -> None:
    picture = pixels(Scene("day", "snow", (Thing(kind, "purple", "left"),)))
    purple = np.abs(picture - COLORS["purple"]).sum(-1) < 12
    assert purple[:, :96].sum() > 400
    assert purple[:, 96:].sum() == 0


def test_captions_tell_everything_or_less() -> None:
    scene = Scene("night", "sea", (Thing("castle", "orange", "right"),), ("moon",))
    full = caption(scene, np.random.default_rng(0))
    assert "an orange castle on the right" in full
    assert {"night", "sea", "moon"} <= set(full.split(", "))
    assert caption(scene, np.random.default_rng(0), detail=0.0) == "a castle"


def test_held_out_scenes_do_not_depend_on_how_many_are_asked_for() -> None:
    assert held_out(8) == held_out(64)[:8]
