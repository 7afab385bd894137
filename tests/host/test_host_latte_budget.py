"""DyDiT Budget and DyDiT Heatmap on a Latte: the contracts of pictures, and maps that have frames."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import as_node, budgeted, last_trace  # first: starts the host
from tiny_dit import transformer
from tiny_latte import DEPTH, FRAMES, SIDE, TOKENS, WIDTH, latte, sample

from counting import block_flops
from dydit_pack.dydit_core.checkpoints.adapter import Adapter, Facts
from dydit_pack.dydit_core.heatmap import paint
from dydit_pack.dydit_core.parts import Extent
from dydit_pack.dydit_core.routers.token import CapacityTable, TokenScores
from dydit_pack.dydit_core.wire import as_bytes, one_map
from dydit_pack.nodes import budget, events, host
from dydit_pack.nodes.classes import conditioning
from dydit_pack.nodes.heatmap import DyDiTHeatmap
from dydit_pack.nodes.teacher import refuse
from nodes import ConditioningSetArea, ConditioningSetMask
from test_host_dit_budget import check_against_masked

CELLS = SIDE // 2


def heatmap(model: object, latent: torch.Tensor, **inputs: object) -> tuple[torch.Tensor, torch.Tensor, str]:
    values = {"step": 0, "block": 0, "branch": "both", "opacity": 1.0, **inputs}
    return as_node(DyDiTHeatmap).EXECUTE_NORMALIZED(model=model, latent={"samples": latent}, **values).result


def test_budget_one_is_the_identity() -> None:
    assert budgeted(latte(), 1.0) is latte()


@pytest.mark.parametrize("method", ["changed tokens", "alternate steps"])
@pytest.mark.parametrize("asked, cfg", [(0.8, 4.0), (0.6, 1.0)])
def test_achieved_meets_asked(method: str, asked: float, cfg: float) -> None:
    sample(budgeted(latte(), asked, method=method), 20, cfg)
    trace = last_trace()
    assert abs(trace.facts["achieved"] - asked) < 0.02
    assert trace.evaluations[0].shape == (DEPTH, 2 if cfg > 1 else 1, TOKENS) and len(trace.evaluations) == 20
    assert (trace.evaluations[0].frames, trace.evaluations[0].grid) == (FRAMES, (CELLS, CELLS))
    assert trace.blocks == ("spatial 0", "temporal 1", "spatial 2", "temporal 3") and trace.facts["size"] == [TOKENS, 2 if cfg > 1 else 1]
    assert not any("forward" in vars(module) for module in transformer(latte()).modules())


def test_an_unconditional_one() -> None:
    sample(budgeted(latte(0), 0.6), 20)
    assert last_trace().facts["achieved"] == pytest.approx(0.6, abs=0.02)


def test_flops_counted_around_a_run() -> None:
    run = {"steps": 12, "cfg": 3.0, "sampler": "dpmpp_2m"}
    with block_flops(latte()) as dense:
        sample(latte(), **run)
    with block_flops(latte()) as count:
        sample(budgeted(latte(), 0.6, min_keep=0.0), **run)
    assert count.flops / dense.flops == pytest.approx(0.6, abs=0.02)
    assert last_trace().facts["achieved"] == pytest.approx(count.flops / dense.flops, abs=1e-3)


def test_a_run_is_the_dense_model_masked_by_its_trace() -> None:
    check_against_masked(latte(), {"steps": 6, "cfg": 3.0, "batch": 2, "side": (FRAMES, SIDE, SIDE)}, branch_share=2.0)


def trained() -> Adapter:
    """An adapter of our own for the tiny Latte, untrained."""
    generator = torch.Generator().manual_seed(3)
    scores = TokenScores(DEPTH, WIDTH, 4, text=False).requires_grad_(False)
    for value in scores.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    quantiles = torch.randn(DEPTH, 4, 9, generator=generator).sort(-1).values
    return Adapter(Facts(0, DEPTH, WIDTH, "Ours", kind="Latte/2"), scores, CapacityTable(quantiles, torch.tensor([0.5, 2.0, 20.0, 160.0])))


@pytest.mark.parametrize("substitute", ["reuse", "nothing"])
def test_an_adapter_of_our_own(substitute: str) -> None:
    sample(budgeted(latte(), 0.7, adapter=trained(), method="learned tokens", substitute=substitute), 20, 2.0)
    assert last_trace().facts["achieved"] == pytest.approx(0.7, abs=0.02)


def test_what_the_node_says_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for module in (budget, host):
        monkeypatch.setattr(module, "send", lambda kind, event: said.extend(event.get("lines", ())))
    sample(budgeted(latte(), 0.6), 2)
    assert said[0].startswith("At 5 frames of 96 × 96 a step costs at least ")


def test_the_memory_it_holds_is_that_of_all_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Extent] = []
    extent_of = host.extent_of
    monkeypatch.setattr(host, "extent_of", lambda *args: seen.append(extent_of(*args)) or seen[-1])
    sample(budgeted(latte(), 0.6), 2, 2.0)
    assert {extent.geometry.image_tokens for extent in seen} == {TOKENS} and len(seen) == 2


def test_prompts_for_an_area_are_refused_and_masked_ones_run() -> None:
    area = ConditioningSetArea().append(conditioning(3), 48, 48, 0, 0, 1.0)[0]
    for model in (latte(), budgeted(latte(), 0.6)):
        with pytest.raises(ValueError, match=r"and the latent is of 48×48; .* and no prompt for an area\.$"):
            sample(model, 1, 2.0, positive=area)
    half = torch.zeros(1, 96, 96)
    half[:, :48] = 1.0
    masked = ConditioningSetMask().append(conditioning(3), half, "default", 1.0)[0]
    found = sample(budgeted(latte(), 0.6), 4, 2.0, positive=masked)
    assert found.isfinite().all() and (found - sample(budgeted(latte(), 0.6), 4, 2.0)).abs().max() > 0.01 * found.std()


def test_gates_are_not_trained_in_the_graph() -> None:
    with pytest.raises(ValueError, match=r"^DyDiT Train: gates for a Latte-64×4/2 are trained in a shell"):
        refuse(latte())


def test_a_mask_for_each_frame() -> None:
    """A frame is protected whole, another in part; of the others nothing."""
    masks = torch.zeros(FRAMES, 96, 96)
    masks[1], masks[3, :48] = 1.0, 1.0
    sample(budgeted(latte(), 0.7, protect=masks), 8, 2.0)
    computed = np.stack([evaluation.mask() for evaluation in last_trace().evaluations]).reshape(8, DEPTH, 2, FRAMES, CELLS, CELLS)
    assert computed[..., 1, :, :].all() and computed[..., 3, :3, :].all() and not computed[2:, ..., 3, 3:, :].all()
    assert not any(computed[2:, ..., frame, :, :].all() for frame in (0, 2, 4))
    sample(budgeted(latte(), 0.7, protect=masks[3:4]), 3)
    computed = np.stack([evaluation.mask() for evaluation in last_trace().evaluations]).reshape(3, DEPTH, FRAMES, CELLS, CELLS)
    assert computed[..., :3, :].all() and not computed[..., 3:, :].all()


def test_masks_for_other_frames_are_refused() -> None:
    with pytest.raises(ValueError, match="^DyDiT Budget: prefer holds 3 masks and the latent 10 frames; connect one mask for all of them, or one for each"):
        sample(budgeted(latte(), 0.7, prefer=torch.zeros(3, 8, 8)), 1, batch=2)
    for masks in (FRAMES, 2 * FRAMES):
        sample(budgeted(latte(), 0.7, prefer=torch.rand(masks, 8, 8)), 1, batch=2)


def test_the_heatmap_has_a_picture_for_each_frame() -> None:
    model = budgeted(latte(), 0.6)
    latent = sample(model, 6, 2.0)
    picture, mask, report = heatmap(model, latent, step=4, block=2, branch="cond (positive)")
    computed = torch.from_numpy(last_trace().evaluations[3].mask())[1, 1].float().unflatten(0, (FRAMES, CELLS, CELLS))
    assert torch.equal(mask, computed.repeat_interleave(16, 1).repeat_interleave(16, 2)) and 0 < computed.mean() < 1
    assert picture.shape == (FRAMES, 96, 96, 3) and not torch.equal(picture[0], picture[1])
    assert "block 2 (temporal 1), prompt cond, one map for each of 5 frames. " in report
    frames = torch.rand(FRAMES, 96, 96, 3)
    over, mask, _ = heatmap(model, latent, opacity=0.5, image=frames)
    assert torch.equal(over, paint(mask, frames, 0.5))
    with pytest.raises(ValueError, match=r"^DyDiT Heatmap: image holds 1 picture, and the video has 5 frames; decode all of them: put LatentCutToBatch"):
        heatmap(model, latent, image=frames[:1])
    with pytest.raises(ValueError, match=r"image holds 10 pictures, and the video has 5 frames; connect them as VAE Decode gave them, cut along t"):
        heatmap(model, latent, image=torch.cat((frames, frames)))  # as frame interpolation makes them
    latent = sample(model, 3, batch=2)
    assert len(heatmap(model, latent, image=torch.cat((frames, frames)))[0]) == 2 * FRAMES and len(heatmap(model, latent, image=frames)[0]) == FRAMES
    with pytest.raises(ValueError, match=r"image holds 15 pictures, and the 2 videos have 5 frames each; connect them"):
        heatmap(model, latent, image=torch.cat((frames, frames, frames)))


def test_at_full_budget_every_frame_is_all_computed() -> None:
    assert (heatmap(latte(), torch.zeros(1, 4, FRAMES, SIDE, SIDE))[1] == torch.ones(FRAMES, 96, 96)).all()


def test_the_widget_is_told_of_every_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    """A temporal block is shown as the others are: what it computed of a frame. All blocks together are live."""
    told: list[dict] = []
    monkeypatch.setattr(events, "send", lambda kind, event: told.append(event) if kind == "dydit.step" else None)
    sample(budgeted(latte(), 0.6), 4)
    masks = np.stack([evaluation.mask()[:, 0] for evaluation in last_trace().evaluations]).reshape(4, DEPTH, FRAMES, CELLS, CELLS)
    for frame in range(FRAMES):
        assert one_map(last_trace(), 2, 3, frame=frame)["grid"] == as_bytes(masks[2, 3, frame])
    assert told and all(event["frames"] == FRAMES and event["each"] == as_bytes(masks[event["step"]].mean(0, dtype=np.float32)) for event in told)
