"""Latte: equal to the authors' class, in parts equal to masks, and what is off costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_runtime import difference
from toy import ScriptedRouter, counted_run, schedule
from toy_dit import reference
from toy_latte import BLOCKS, FAMILY, LatteScene, sees, tiny_latte

from dydit_core.budget import Plan
from dydit_core.families.known import family_of
from dydit_core.models.dit import DiT, DiTConfig
from dydit_core.models.latte import Latte, LatteConfig
from dydit_core.routers.change import ChangeRouter
from dydit_core.runtime import Method
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing

OFFICIAL = Path(__file__).parent.parent / "fixtures" / "latte_official.safetensors"


@pytest.mark.parametrize("kind, classes", [("class", 7), ("free", 0)])
def test_the_output_is_the_authors(kind: str, classes: int) -> None:
    recorded = {key.removeprefix(f"{kind}/"): tensor for key, tensor in load_file(OFFICIAL).items() if key.startswith(kind)}
    model = Latte(LatteConfig(hidden_size=32, depth=4, num_heads=4, side=4, frames=3, classes=classes))
    model.load_state_dict({key.removeprefix("weights/"): tensor.float() for key, tensor in recorded.items() if key.startswith("weights/")})
    with torch.no_grad():
        out = model(recorded["x"].transpose(1, 2), recorded["t"], recorded["y"] if classes else None)
    assert difference(out.transpose(1, 2), recorded["out"]) < 1e-5


def test_positions_and_times_are_those_of_the_files() -> None:
    recorded, made = load_file(OFFICIAL), Latte(LatteConfig(hidden_size=32, depth=2, num_heads=4, side=4, frames=3))
    for name in ("pos_embed", "temp_embed"):
        assert torch.equal(getattr(made, name), recorded[f"free/weights/{name}"])


def test_the_family_is_found() -> None:
    model = tiny_latte()
    assert family_of(model).name == "Latte" and family_of(DiT(DiTConfig(hidden_size=16, depth=1, num_heads=2, side=4))).name == "DiT"
    assert FAMILY.names(model) == ["spatial 0", "temporal 1", "spatial 2", "temporal 3"]
    assert "temp_embed" in FAMILY.refusal(DiT(DiTConfig(hidden_size=16, depth=1, num_heads=2, side=4)))


def test_full_capacity_is_the_models_own_forward() -> None:
    scene = LatteScene(rows=2)
    outputs = scene.run(Plan(1.0), Method(ScriptedRouter([1.0] * BLOCKS), Nothing()), [0.6])[1]
    assert difference(outputs[0], scene.blocks(*scene.embed(0.6))) < 1e-6


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
def test_leaving_out_equals_masking(stand_in: Nothing | Reuse) -> None:
    """Of an attention over the whole video, in which each token sees those of its frame or of its position."""
    scene = LatteScene(rows=2)
    router = ScriptedRouter([0.2, 1.0, 0.55, 0.4], stand_in.needs_history)
    _, outputs, trace = scene.run(Plan(0.5, min_keep=0.0), Method(router, stand_in), schedule(3))
    history = {} if stand_in.needs_history else None
    for sigma, output, evaluation in zip(schedule(3), outputs, trace):
        computed = torch.from_numpy(evaluation.mask())
        assert difference(output, reference(scene.model, scene.embed(sigma), computed, history, sees=sees())) < 1e-5


def test_costs_are_what_the_counter_sees() -> None:
    run, spent = counted_run(LatteScene(rows=2), Plan(0.7), Method(ChangeRouter(), Reuse()), schedule(8))
    assert spent == pytest.approx(run.ledger.achieved, rel=2e-3)
    assert spent == pytest.approx(0.7, rel=0.02)


def test_xl_costs() -> None:
    """Multiply-adds of a pair of blocks of Latte-XL/2 at 16 frames of 256², in G: linear layers on 4096 tokens, 256 or 16 keys each."""
    with torch.device("meta"):
        model = Latte(LatteConfig(depth=2))
    costs = FAMILY.costs(model, FAMILY.geometry(model, 16 * 256), LatteScene().backend)
    linear, width = 4096 * 12 * 1152**2, 1152
    for cost, keys in zip(costs, (256, 16)):
        assert cost.at(4096) / 2 == pytest.approx(linear + 2 * 4096 * keys * width + 6 * width**2)


@pytest.mark.parametrize("shape, words", [((1, 4, 12, 12), "the latent is of a picture"), ((1, 4, 7, 12, 12), "made for 5 frames, and the latent has 7"),
                                          ((1, 4, 5, 12, 16), "frames of 96×96, and the latent is of 128×96")])
def test_other_latents_are_refused(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_latte()(torch.zeros(shape), torch.zeros(1), torch.zeros(1, dtype=torch.long))
