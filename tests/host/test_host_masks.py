"""Protect and prefer on the node: from a MASK socket to the tokens of a run."""

from __future__ import annotations

import pytest
import torch
from tiny import BLOCKS, adapter, budgeted, flux, last_trace, prompt, sample  # first: starts the host


def left(height: int = 64, width: int = 64, pictures: int = 1) -> torch.Tensor:
    mask = torch.zeros(pictures, height, width)
    mask[..., : width // 2] = 1.0
    return mask


@pytest.mark.parametrize("method, substitute", [("auto", "auto"), ("alternate steps", "reuse")])
def test_protected_tokens_are_computed_in_every_step(method: str, substitute: str) -> None:
    mask = left(200, 100)
    model = budgeted(flux(), 0.8, method=method, substitute=substitute, protect=mask)
    mask.zero_()  # the node keeps its own copy: another node may write into this one
    sample(model, 6, 2.0, batch=2)
    trace = last_trace()
    for evaluation in trace.evaluations:
        computed = evaluation.mask().reshape(BLOCKS, 4, 8, 8)
        assert computed[..., :4].all()
    assert not trace.evaluations[2].mask().all()
    assert trace.facts["achieved"] == pytest.approx(0.8, abs=0.02)


def test_a_protected_picture_cannot_reach_a_low_budget_and_says_so() -> None:
    sample(budgeted(flux(), 0.4, protect=torch.ones(1, 64, 64)), 4)
    trace = last_trace()
    assert trace.facts["achieved"] == 1.0
    assert any("100 % is the least this graph can spend here" in line for line in trace.facts["lines"])


def test_preferred_tokens_get_more() -> None:
    shares = []
    for prefer in (None, left()):
        sample(budgeted(flux(), 0.6, prefer=prefer), 6)
        masks = torch.stack([torch.from_numpy(evaluation.mask()) for evaluation in last_trace().evaluations[1:]])
        shares.append(masks.reshape(-1, 8, 8)[..., :4].float().mean().item())
    assert shares[1] > 1.25 * shares[0]
    assert last_trace().facts["achieved"] == pytest.approx(0.6, abs=0.02)


def test_full_budget_with_masks_is_the_identity() -> None:
    assert budgeted(flux(), 1.0, protect=left(), prefer=left()) is flux()


def test_masks_for_another_number_of_pictures_are_refused() -> None:
    with pytest.raises(ValueError, match="protect holds 3 masks and the latent 2 pictures; connect one mask for all of them, or one for each"):
        sample(budgeted(flux(), 0.6, protect=left(pictures=3)), 2, batch=2)
    assert last_trace().facts["state"] == "failed"
    with pytest.raises(ValueError, match="prefer holds 2 masks and the latent 4 pictures"):
        sample(budgeted(flux(), 0.6, protect=left(pictures=4), prefer=left(pictures=2)), 2, batch=4)
    sample(budgeted(flux(), 0.6, protect=left(pictures=2)), 2, batch=2)
    assert last_trace().facts["state"] == "done"


@pytest.mark.parametrize("mask", [torch.full((1, 8, 8), float("nan")), torch.zeros(1, 0, 8), torch.zeros(1, 3, 8, 8)])
def test_what_is_no_mask_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="DyDiT Budget: prefer is not a mask"):
        budgeted(flux(), 0.6, prefer=mask)


def test_a_prompt_for_an_area_is_not_marked() -> None:
    """It runs on a part of the picture, over which the mask would be stretched."""
    area = [[prompt(1)[0][0], {**prompt(1)[0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]
    model = budgeted(flux(), 0.5, substitute="nothing", method="learned tokens", adapter=adapter(), protect=torch.ones(1, 8, 8))
    sample(model, 2, positive=area)
    assert last_trace().facts["achieved"] < 0.7
    sample(model, 2)
    assert last_trace().facts["achieved"] == 1.0


def test_the_node_says_where_masks_do_not_reach() -> None:
    area = [[prompt(1)[0][0], {**prompt(1)[0][1], "area": (8, 8, 0, 0), "strength": 1.0}]]
    for inputs, said in (({"prefer": left()}, True), ({}, False)):
        sample(budgeted(flux(), 0.6, **inputs), 2, positive=area)
        assert any("A prompt here is for an area" in line for line in last_trace().facts["lines"]) is said


def test_what_a_mask_does_to_the_floor_is_said() -> None:
    sample(budgeted(flux(), 0.4, protect=torch.ones(1, 64, 64)), 4)
    assert any("the protected 100 % of the tokens" in line for line in last_trace().facts["lines"])
