"""Latte files in the host: converted, loaded by the node that loads DiT's, and run by their own routers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dit_files import load, models, routers, write  # noqa: F401 - first: starts the host; the fixture works by being here
from safetensors.torch import save_file
from test_host_dit_files import kept
from tiny import budgeted, last_trace
from tiny_dit import config as dit_config
from tiny_latte import DEPTH, FRAMES, SIDE, config, latte, network, sample

import comfy.sample
import comfy.samplers
from dydit_pack.dydit_core.budget import Plan
from dydit_pack.dydit_core.checkpoints.convert import convert
from dydit_pack.dydit_core.methods import resolve
from dydit_pack.dydit_core.models.latte import Latte, LatteConfig
from dydit_pack.dydit_core.sampling import sample as sample_plainly
from dydit_pack.dydit_core.standalone import Budgeted


def converted(folder: Path, shape: LatteConfig, routed: bool = False) -> Path:
    """What `convert` makes of a training's checkpoint."""
    tensors = {**network(shape).state_dict(), **(routers(shape) if routed else {})}
    given = folder.parent / "0010000.pt"
    torch.save({"model": {}, "ema": tensors}, given)
    return convert(given, folder / f"latte_{shape.classes}_{routed}.safetensors", heads=shape.num_heads).base


@pytest.mark.parametrize("classes", [10, 0])
def test_a_converted_file_is_a_model(models: Path, classes: int) -> None:
    model, adapter = load(converted(models, config(classes=classes)), guidance_channels="first three (as the original)")
    assert adapter is None and isinstance(model.model.diffusion_model, Latte)
    assert "sampler_cfg_function" not in model.model_options, "its authors guide all four channels"
    assert torch.equal(sample(model, 3, 2.0 if classes else 1.0), sample(latte(classes), 3, 2.0 if classes else 1.0))
    again = model.clone(disable_dynamic=True, force_deepcopy=True)
    assert again.model is not model.model and torch.equal(sample(again, 2), sample(model, 2))


@pytest.mark.parametrize("method, budget", [("checkpoint", 0.3), ("learned tokens", 0.6)])
def test_its_routers_draw_what_plain_torch_does(models: Path, method: str, budget: float) -> None:
    model, adapter = load(converted(models, config(), routed=True))
    schedule = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8).tolist()
    noise = comfy.sample.prepare_noise(torch.zeros(2, 4, FRAMES, SIDE, SIDE), 5) * (1 + schedule[0] ** 2) ** 0.5
    with Budgeted(network(config()), Plan(budget, min_keep=0.1), resolve(method, "nothing", adapter.router)[2], schedule[:-1]) as plain:
        expected = sample_plainly(plain, (torch.tensor([3, 3]),), noise, schedule=schedule) / 0.18215
    found = sample(budgeted(model, budget, adapter=adapter, method=method), 8, batch=2)
    trace, masks = last_trace(), kept(last_trace().evaluations)
    assert (masks == kept(plain.spent.evaluations)).all() and trace.facts["achieved"] == pytest.approx(plain.spent.achieved)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    for kind in (0, 1):
        assert 0.2 < masks[1:, kind::2].mean() < 0.9, "spatial and temporal blocks"
    assert trace.evaluations[4].heads.values().shape[0] == DEPTH


@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_achieved_meets_asked(models: Path, budget: float) -> None:
    model, adapter = load(converted(models, config(), routed=True))
    sample(budgeted(model, budget, adapter=adapter), 20, 3.0)
    assert last_trace().facts["achieved"] == pytest.approx(budget, abs=0.02)
    assert any("learned tokens × nothing" in line for line in last_trace().facts["lines"])


def test_routers_of_pictures_are_not_those_of_videos(models: Path) -> None:
    model, adapter = load(converted(models, config(), routed=True))
    picture, other = load(write(models, "picture.safetensors", dit_config(depth=DEPTH)))
    with pytest.raises(ValueError, match="was made for a Latte/2 of width 64 with 4 blocks; this model is a DiT/2 of width 64 with 4 blocks"):
        budgeted(picture, adapter=adapter)
    with pytest.raises(ValueError, match='"picture.safetensors" was made for a DiT/2 of width 64 with 4 blocks; this model is a Latte/2 of width 64 with 4 blocks'):
        budgeted(model, adapter=other)


def test_a_latte_of_prompts_is_refused(models: Path) -> None:
    save_file({**network(config(classes=0)).state_dict(), "text_embedding_projection.1.weight": torch.zeros(64, 8)}, models / "t2v.safetensors", {"heads": "4"})
    with pytest.raises(ValueError, match=r"^t2v.safetensors is a Latte that reads prompts \(text_embedding_projection.1.weight\); choose one of classes"):
        load(models / "t2v.safetensors")
