"""Latte files in the host: loaded by the node that loads DiTs, with and without routers."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

from pathlib import Path

import pytest
import torch
from counting import block_flops
from dit_files import load, models, write  # noqa: F401 - the fixture works by being here
from dydit_pack.nodes.video import DyDiTEmptyVideo
from safetensors.torch import save_file
from tiny import as_node, budgeted, last_trace
from tiny_dit import config as dit_config
from tiny_dit import dit
from tiny_latte import FRAMES, config, latte, network, sample

FIRST = "first three (as the original)"


@pytest.mark.parametrize("classes, routed", [(10, False), (10, True), (0, False)], ids=["classes", "classes and routers", "unconditional"])
def test_the_model_is_that_of_the_file(models: Path, classes: int, routed: bool) -> None:
    facts = {} if classes else {"classes": "[]"}
    model, adapter = load(write(models, f"latte{classes}.safetensors", config(classes=classes), routed, **facts), guidance_channels=FIRST)
    assert torch.equal(sample(model, 3, 2.0), sample(latte(classes), 3, 2.0)) and (adapter is not None) == routed
    assert "sampler_cfg_function" not in model.model_options  # its authors guide all channels
    again = model.clone(disable_dynamic=True, force_deepcopy=True)
    assert again.model is not model.model and torch.equal(sample(again, 3, 2.0), sample(latte(classes), 3, 2.0))
    latent = as_node(DyDiTEmptyVideo).EXECUTE_NORMALIZED(model=budgeted(model, 0.5), batch_size=1).result[0]["samples"]
    assert latent.shape == (1, 4, FRAMES, 12, 12)


@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_the_files_routers_meet_the_budget(models: Path, budget: float) -> None:
    model, adapter = load(write(models, "routed_latte.safetensors", config()))
    run = {"steps": 20, "cfg": 3.0}
    with block_flops(model) as dense:
        sample(model, **run)
    with block_flops(model) as count:
        sample(budgeted(model, budget, adapter=adapter), **run)
    assert count.flops / dense.flops == pytest.approx(budget, abs=0.02)
    trace = last_trace()
    assert trace.facts["achieved"] == pytest.approx(count.flops / dense.flops, abs=2e-3)
    assert trace.evaluations[4].heads is not None and trace.evaluations[4].frames == FRAMES


def test_the_slider_is_ignored_at_the_files_own_threshold(models: Path) -> None:
    model, adapter = load(write(models, "routed_latte.safetensors", config()))
    videos = [sample(budgeted(model, budget, adapter=adapter, method="checkpoint"), 4, 3.0) for budget in (0.3, 0.9)]
    assert torch.equal(*videos) and 0.1 < last_trace().facts["achieved"] < 0.9


def test_what_is_refused(models: Path) -> None:
    path = write(models, "routed_latte.safetensors", config())
    with pytest.raises(ValueError, match="turn interpolate_positions off"):
        load(path, interpolate_positions=True)
    with pytest.raises(ValueError, match='"routed_latte.safetensors" was made for a model of width 64 with 4 blocks for video; this one has width 64 with 3 blocks'):
        budgeted(dit(), adapter=load(path)[1])
    picture, _ = load(write(models, "picture.safetensors", dit_config(), routed=False))
    with pytest.raises(ValueError, match="^DyDiT Empty Video: this model is no Latte"):
        as_node(DyDiTEmptyVideo).EXECUTE_NORMALIZED(model=picture, batch_size=1)
    save_file(dict(network(config()).state_dict()) | {"text_embedding_projection.1.weight": torch.zeros(1)}, models / "prompted.safetensors", {"heads": "4"})
    with pytest.raises(ValueError, match=r"^prompted\.safetensors is a Latte that reads prompts"):
        load(models / "prompted.safetensors")
