"""DyDiT Heatmap in the host: the map of the run that gave a LATENT, as image, mask and words."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import BLOCKS, as_node, budgeted, flux, last_trace, sample  # first: starts the host

from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.colours import cividis
from dydit_pack.dydit_core.heatmap import paint
from dydit_pack.dydit_core.trace import TraceStore
from dydit_pack.nodes import events, heatmap, host
from dydit_pack.nodes.heatmap import DyDiTHeatmap

PIXELS = 16  # of a token


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = TraceStore()
    for module in (events, heatmap, host):
        monkeypatch.setattr(module, "STORE", kept)


def run(model: ModelPatcher, latent: torch.Tensor, **inputs: object) -> tuple[torch.Tensor, torch.Tensor, str]:
    values = {"step": 0, "block": 0, "branch": "both", "opacity": 1.0, **inputs}
    return as_node(DyDiTHeatmap).EXECUTE_NORMALIZED(model=model, latent={"samples": latent}, **values).result


def as_tokens(mask: torch.Tensor) -> np.ndarray:
    """The value of each token; all of its pixels must agree."""
    tokens = mask[0].unfold(0, PIXELS, PIXELS).unfold(1, PIXELS, PIXELS).flatten(2)
    assert torch.equal(tokens, tokens[..., :1].expand_as(tokens))
    return tokens[..., 0].numpy()


def test_the_mask_is_what_was_computed() -> None:
    model = budgeted(flux(), 0.6, branch_share=2.0)
    latent = sample(model, 4, 2.0, batch=2, size=(16, 20))
    masks = np.stack([evaluation.mask() for evaluation in last_trace().evaluations]).reshape(4, BLOCKS, 2, 2, 8, 10)
    uncond, cond = masks[:, :, 0].mean(2), masks[:, :, 1].mean(2)  # the host puts uncond first; pictures of a batch are averaged
    for inputs, expected in (({}, (cond + uncond).mean((0, 1)) / 2), ({"step": 2}, (cond + uncond)[1].mean(0) / 2),
                             ({"block": 3}, (cond + uncond)[:, 2].mean(0) / 2), ({"step": 3, "block": 1, "branch": "cond (positive)"}, cond[2, 0]),
                             ({"step": 4, "branch": "uncond (negative)"}, uncond[3].mean(0))):
        picture, mask, report = run(model, latent, **inputs)
        assert mask.shape == (1, 128, 160) and picture.shape == (1, 128, 160, 3)
        assert np.abs(as_tokens(mask) - expected).max() < 1e-3
        assert torch.equal(picture, cividis(mask))
    assert "step 4 of 4, the mean of 3 blocks, prompt uncond" in report and "Asked 60 %, spent 60" in report


def test_the_map_lies_over_every_picture_of_the_batch() -> None:
    model = budgeted(flux(), 0.6)
    latent = sample(model, 3, batch=2)
    pictures = torch.rand(2, 256, 256, 3)
    picture, mask, _ = run(model, latent, image=pictures, opacity=0.25)
    assert mask.shape == (1, 256, 256) and torch.allclose(picture, paint(mask, pictures, 0.25), atol=1e-6)


def test_a_picture_whose_edge_is_half_a_token() -> None:
    model = budgeted(flux(), 0.6)
    latent = sample(model, 3, size=(15, 16))
    _, mask, _ = run(model, latent)
    assert mask.shape == (1, 120, 128)
    expected = last_trace().map()
    assert np.allclose(mask[0, 8::16, 8::16].numpy()[:7], expected[:7], atol=1e-3) and np.allclose(mask[0, 119, 8::16], expected[7], atol=1e-3)


def test_full_budget_is_all_computed() -> None:
    picture, mask, report = run(flux(), torch.zeros(1, 16, 16, 16))
    assert (mask == 1).all() and mask.shape == (1, 128, 128) and torch.allclose(picture, cividis(torch.ones(128, 128)))
    assert report.startswith("The budget is 100 % here, or there is no DyDiT Budget, so the model is untouched and everything is computed.")


def test_two_samplers_of_one_model_are_two_runs() -> None:
    model = budgeted(flux(), 0.5)
    latents = [sample(model, 4, seed=seed) for seed in (1, 2)]
    maps = [run(model, latent)[1] for latent in latents]
    assert not torch.equal(*maps)
    assert torch.equal(run(model, latents[0].clone().half().float())[1], maps[0]), "ComfyUI may keep latents in float16"


@pytest.mark.parametrize("inputs, words", [
    ({"step": 5}, "there is no step 5; this run has the steps 1 to 4, and 0 is their mean"),
    ({"block": 4}, "there is no block 4; this run has the blocks 1 to 3, and 0 is their mean"),
    ({"branch": "uncond (negative)"}, "set branch to both"),
])
def test_what_is_not_there_is_a_sentence(inputs: dict, words: str) -> None:
    model = budgeted(flux(), 0.5)
    latent = sample(model, 4)
    with pytest.raises(ValueError, match=f"DyDiT Heatmap: .*{words}"):
        run(model, latent, **inputs)


def test_a_latent_of_another_run_and_a_run_that_left_the_store() -> None:
    model, other = budgeted(flux(), 0.5), budgeted(flux(), 0.6)
    latent = sample(model, 2)
    for wrong in ((other, latent), (model, latent + 1e-2)):
        with pytest.raises(ValueError, match="no run of this MODEL that gave this LATENT is kept"):
            run(*wrong)
    for seed in range(8):
        sample(other, 2, seed=seed)
    with pytest.raises(ValueError, match="change the seed and queue again"):
        run(model, latent)


def test_a_run_too_large_to_keep() -> None:
    events.STORE.max_bytes = heatmap.STORE.max_bytes = 10
    model = budgeted(flux(), 0.5)
    latent = sample(model, 2)
    with pytest.raises(ValueError, match="nothing was recorded in this run, as it was too large to keep"):
        run(model, latent)


def test_a_model_without_a_budget_beside_a_latent_of_one() -> None:
    latent = sample(budgeted(flux(), 0.5), 2)
    with pytest.raises(ValueError, match="this LATENT came of a run with DyDiT Budget, and the MODEL here has none"):
        run(flux(), latent)
