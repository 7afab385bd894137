"""DiT, SiT and DyDiT files in the host: loaded by one node, and sampled by their own threshold and by the slider."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

from pathlib import Path
from typing import Any

import comfy.samplers
import numpy as np
import pytest
import torch
from counting import block_flops
from dit_files import load, models, routers, write  # noqa: F401 - the fixture works by being here
from dydit_pack.dydit_core.budget import Plan
from dydit_pack.dydit_core.methods import resolve
from dydit_pack.dydit_core.models.dit import EPS, FLOW
from dydit_pack.dydit_core.runtime import Method
from dydit_pack.dydit_core.sampling import sample as sample_plainly
from dydit_pack.dydit_core.standalone import Budgeted
from dydit_pack.dydit_core.substitutes.nothing import Nothing
from dydit_pack.dydit_core.train.calibrate_dit import calibrate_file
from dydit_pack.nodes.budget import _reach
from dydit_pack.nodes.guidance import three_channels
from safetensors.torch import save_file
from tiny import budgeted, flux, last_trace
from tiny_dit import CLASSES, DEPTH, NAMES, config, dit, network, noise_of, sample
from torch import Tensor

BOTH = pytest.mark.parametrize("prediction", [EPS, FLOW])

@BOTH
@pytest.mark.parametrize("routed", [False, True], ids=["plain", "with routers"])
def test_the_model_is_that_of_the_file(models: Path, prediction: str, routed: bool) -> None:
    model, adapter = load(write(models, f"{prediction}.safetensors", config(prediction), routed))
    assert torch.equal(sample(model, 3, 2.0), sample(dit(prediction), 3, 2.0)) and (adapter is not None) == routed
    assert model.model.class_names == NAMES and not any("router" in key or "mlp_head" in key for key in model.model.diffusion_model.state_dict())
    again = model.clone(disable_dynamic=True, force_deepcopy=True)
    assert again.model is not model.model and torch.equal(sample(again, 3, 2.0), sample(dit(prediction), 3, 2.0))


def test_the_inputs_of_the_loader(models: Path) -> None:
    path = write(models, "inputs.safetensors", config())
    original, _ = load(path, guidance_channels="first three (as the original)")
    assert original.model_options["sampler_cfg_function"] is three_channels and "sampler_cfg_function" not in load(path)[0].model_options
    with pytest.raises(ValueError, match="turn on interpolate_positions in DyDiT Checkpoint Loader"):
        sample(original, 1, side=20)
    assert sample(load(path, interpolate_positions=True)[0], 1, side=20).shape == (1, 4, 20, 20)


def kept(evaluations: Any) -> np.ndarray:
    """Masks [evaluations, blocks, rows, tokens]."""
    return np.stack([evaluation.mask() for evaluation in evaluations])


@BOTH
@pytest.mark.parametrize("method, budget", [("checkpoint", 0.3), ("learned tokens", 0.6)])
def test_the_host_draws_what_plain_torch_does(models: Path, prediction: str, method: str, budget: float) -> None:
    """By the file's own threshold, and at a budget: the same masks, the same latent. Rows of a batch may keep different numbers."""
    model, adapter = load(write(models, "routed.safetensors", config(prediction)))
    schedule = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8).tolist()
    start = schedule[0] if prediction == FLOW else (1 + schedule[0] ** 2) ** 0.5
    chosen = resolve(method, "nothing", adapter.router)[2]
    with Budgeted(network(config(prediction)), Plan(budget, min_keep=0.1), chosen, schedule[:-1]) as plain:
        expected = sample_plainly(plain, (torch.tensor([3, 3]),), noise_of(2) * start, schedule=schedule) / 0.18215
    found = sample(budgeted(model, budget, adapter=adapter, method=method), 8, batch=2)
    trace, masks = last_trace(), kept(last_trace().evaluations)
    assert (masks == kept(plain.spent.evaluations)).all() and trace.facts["achieved"] == pytest.approx(plain.spent.achieved)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
    assert 0.2 < masks[1:].mean() < 0.8 and (found - sample(model, 8, batch=2)).abs().max() > 0.05 * expected.std()
    counts = masks.sum(3)
    assert (counts[..., 0] != counts[..., 1]).any() == (method == "checkpoint")


def test_the_slider_is_ignored_at_the_files_own_threshold(models: Path) -> None:
    model, adapter = load(write(models, "routed.safetensors", config()))
    pictures = [sample(budgeted(model, budget, adapter=adapter, method="checkpoint"), 4, 3.0) for budget in (0.3, 0.9)]
    assert torch.equal(*pictures) and last_trace().evaluations[0].computed < 0.9
    assert last_trace().facts["ignored"] and "the slider is ignored." in last_trace().facts["lines"][1]


def test_dense_is_not_what_a_dydit_was_trained_for(models: Path) -> None:
    model, adapter = load(write(models, "routed.safetensors", config()))
    assert budgeted(model, 1.0, adapter=adapter) is model
    untouched, together = last_trace().facts["lines"]
    assert "the model is untouched" in untouched and together == "It was trained together with its routers: dense it draws other pictures, and not always better ones."


@BOTH
@pytest.mark.parametrize("budget", [0.8, 0.6, 0.5])
def test_achieved_meets_asked(models: Path, prediction: str, budget: float) -> None:
    """auto takes the file's routers; counted around the run."""
    model, adapter = load(write(models, "routed.safetensors", config(prediction)))
    run = {"steps": 20, "cfg": 3.0, "batch": 2}
    with block_flops(model) as dense:
        sample(model, **run)
    with block_flops(model) as count:
        sample(budgeted(model, budget, adapter=adapter), **run)
    assert count.flops / dense.flops == pytest.approx(budget, abs=0.02)
    assert last_trace().facts["achieved"] == pytest.approx(count.flops / dense.flops, abs=2e-3)
    assert last_trace().evaluations[4].heads is not None and any("learned tokens × nothing" in line for line in last_trace().facts["lines"])


@BOTH
def test_a_calibrated_file_meets_a_budget_in_four_steps(models: Path, prediction: str) -> None:
    """Its first evaluation is routed too, and no line says that it is not."""
    path = write(models, "routed.safetensors", config(prediction))
    calibrated = models / f"calibrated_{prediction}.safetensors"
    calibrate_file(path, calibrated, pictures=4, steps=8)
    model, adapter = load(calibrated)
    with block_flops(model) as dense:
        sample(model, 4)
    with block_flops(model) as count:
        sample(budgeted(model, 0.6, adapter=adapter), 4)
    trace = last_trace()
    assert count.flops / dense.flops == pytest.approx(0.6, rel=0.02) and trace.facts["achieved"] == pytest.approx(count.flops / dense.flops, abs=2e-3)
    assert trace.evaluations[0].computed < 0.95 and trace.evaluations[0].flops < 0.9
    reach = "after a first step at 100 %"
    assert reach not in _reach(model.model.diffusion_model, 0.1, Method(adapter.router, Nothing()))
    assert reach in _reach(model.model.diffusion_model, 0.1, Method(load(path)[1].router, Nothing()))


def test_a_calibrated_file_has_a_lower_floor_and_says_so(models: Path) -> None:
    """20 % in four steps is below what is left beside a dense first evaluation."""
    path, calibrated = write(models, "routed.safetensors", config()), models / "calibrated_floor.safetensors"
    calibrate_file(path, calibrated, pictures=4, steps=8)
    facts = []
    for file in (path, calibrated):
        model, adapter = load(file)
        sample(budgeted(model, 0.2, adapter=adapter), 4)
        facts.append(last_trace().facts)
    dense, routed = (next(line for line in one["lines"] if "is the least" in line or "The floor" in line) for one in facts)
    assert float(dense.partition(" %")[0]) == pytest.approx(100 * facts[0]["achieved"], abs=1.0) and facts[0]["achieved"] > 0.3
    assert float(routed.removeprefix("The floor here is ").removesuffix(" %.")) < 20 and facts[1]["achieved"] == pytest.approx(0.2, rel=0.02)


def test_a_plain_file_works_without_an_adapter(models: Path) -> None:
    """What its adapter output gives may stay connected."""
    model, adapter = load(write(models, "plain.safetensors", config(), routed=False))
    sample(budgeted(model, 0.6, adapter=adapter), 20)
    assert last_trace().facts["achieved"] == pytest.approx(0.6, abs=0.02)
    with pytest.raises(ValueError, match='"checkpoint" needs the routers of a released DyDiT file'):
        budgeted(model, adapter=adapter, method="checkpoint")


@pytest.mark.parametrize("changed, kind", [({"prediction": FLOW}, "SiT/2"), ({"patch_size": 4}, "DiT/4")])
def test_routers_of_another_prediction_or_patch_are_refused(models: Path, changed: dict, kind: str) -> None:
    plain, own = load(write(models, "one.safetensors", config()))
    other, others = load(write(models, "other.safetensors", config(**changed)))
    with pytest.raises(ValueError, match=f"was made for a DiT/2 of width 64 with 3 blocks; this model is a {kind} of width 64 with 3 blocks"):
        budgeted(other, adapter=own)
    with pytest.raises(ValueError, match=f"was made for a {kind} of width 64 with 3 blocks; this model is a DiT/2 of width 64 with 3 blocks"):
        budgeted(plain, adapter=others)


def test_routers_of_another_model_are_refused(models: Path) -> None:
    _, adapter = load(write(models, "routed.safetensors", config()))
    with pytest.raises(ValueError, match='"routed.safetensors" was made for a DiT/2 of width 64 with 3 blocks; this model is a FLUX of width 256 with 1 double'):
        budgeted(flux(), adapter=adapter)
    other, _ = load(write(models, "other.safetensors", config(num_heads=8), routed=False))
    with pytest.raises(ValueError, match='the routers of "routed.safetensors" decide 4 attention heads; this model has 8'):
        budgeted(other, adapter=adapter)
    shifted = dict(network(config()).state_dict())
    shifted["x_embedder.proj.bias"] = shifted["x_embedder.proj.bias"] + 1
    save_file(shifted, models / "tuned.safetensors", {"prediction": EPS, "heads": "4"})
    sample(budgeted(load(models / "tuned.safetensors")[0], 0.6, adapter=adapter), 2)
    assert any("x_embedder.proj.bias differs" in line for line in last_trace().facts["lines"])


def test_files_that_are_refused(models: Path) -> None:
    tensors = dict(network(config()).state_dict()) | routers(config())
    facts = {"prediction": EPS, "heads": "4"}

    def refusal(name: str, changed: dict[str, Tensor | None], **more: str) -> str:
        save_file({key: value for key, value in (tensors | changed).items() if value is not None}, models / name, facts | more)
        with pytest.raises(ValueError) as caught:
            load(models / name)
        assert str(caught.value).startswith(name) and str(caught.value).endswith(".") and "\n" not in str(caught.value)
        return str(caught.value)

    lost = f"blocks.{DEPTH - 1}.attn_rate.router.bias"
    assert f"lacks the tensor {lost}" in refusal("lacking.safetensors", {lost: None})
    assert "blocks.0.mlp.fc1.weight" in refusal("half.safetensors", {"blocks.0.mlp.fc1.weight": None})
    assert "has a tensor extra.weight that no DiT" in refusal("extra.safetensors", {"extra.weight": torch.zeros(1)})
    assert "not finite" in refusal("nan.safetensors", {lost: torch.full_like(tensors[lost], torch.nan)})
    assert f"3 classes in its metadata and {CLASSES}" in refusal("classes.safetensors", {}, classes="3")
    save_file({"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight": torch.zeros(2, 2)}, models / "diffusers.safetensors")
    with pytest.raises(ValueError, match=r"^diffusers.safetensors is a DiT in diffusers' layout .* run python -m dydit_core convert on it\.$"):
        load(models / "diffusers.safetensors")
    torch.save({"ema": tensors}, models / "released.pt")
    with pytest.raises(ValueError, match=r"released.pt is a PyTorch file; run python -m dydit_core convert .*released.pt OUT"):
        load(models / "released.pt")
