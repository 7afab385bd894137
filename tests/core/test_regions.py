"""Protected tokens are computed in every block and evaluation, preferred ones before others, and the budget is met."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
from test_runtime import HALVES, difference
from toy import BLOCKS, ScriptedRouter, Scene, gaussian_router, schedule

from dydit_core.budget import Plan, capacity, forecast, share_between
from dydit_core.parts import Router
from dydit_core.regions import Regions, Zones
from dydit_core.routers.alternate import AlternateRouter
from dydit_core.routers.change import ChangeRouter
from dydit_core.routers.random import RandomRouter
from dydit_core.runtime import Method, Run
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing
from dydit_core.recorder import Recorder

SIDE = 8
ROUTERS = [(ChangeRouter(), Reuse()), (AlternateRouter(), Reuse()), (gaussian_router(), Nothing()), (RandomRouter(), Reuse())]
NAMES = ["changed", "alternate", "learned", "random"]


def corner(size: int, pixels: int = 128, value: float = 1.0) -> torch.Tensor:
    """[1, pixels, pixels], white in a corner of `size` × `size` tokens of 8 × 8."""
    mask = torch.zeros(1, pixels, pixels)
    mask[:, :size * pixels // SIDE, :size * pixels // SIDE] = value
    return mask


def traced(scene: Scene, plan: Plan, method: Method, steps: int, regions: Regions) -> tuple[Run, np.ndarray]:
    """A run, and what was computed [evaluations, blocks, rows, 8, 8]."""
    recorder = Recorder()
    run = Run(plan, method, schedule(steps), recorder, regions)
    for sigma in schedule(steps):
        scene.evaluate(run, sigma)
    run.finish()
    return run, np.stack([evaluation.mask() for evaluation in recorder.finish()]).reshape(steps, BLOCKS, scene.rows, SIDE, SIDE)


@pytest.mark.parametrize("router, stand_in", ROUTERS, ids=NAMES)
@pytest.mark.parametrize("share", [1.0, 4.0])
def test_protected_tokens_are_always_computed(router: Router, stand_in: Nothing | Reuse, share: float) -> None:
    scene = Scene(rows=4, branches=HALVES)
    run, computed = traced(scene, Plan(0.6, branch_share=share), Method(router, stand_in), 8, Regions(protect=corner(4)))
    assert computed[..., :4, :4].all() and not computed[2:, ..., 4:, 4:].all()
    assert run.ledger.achieved == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("router, stand_in", ROUTERS, ids=NAMES)
def test_what_is_protected_raises_the_floor(router: Router, stand_in: Nothing | Reuse) -> None:
    scene, method, regions = Scene(), Method(router, stand_in), Regions(protect=corner(6))
    floor = forecast(Plan(0.0), router, schedule(8), scene.costs, 64, method.needs_history, protected=36)
    assert floor > forecast(Plan(0.0), router, schedule(8), scene.costs, 64, method.needs_history) + 0.1
    run, computed = traced(scene, Plan(0.0), method, 8, regions)
    assert run.ledger.achieved == pytest.approx(floor, abs=0.02)
    assert computed[..., :6, :6].all() and computed[-1].mean() == pytest.approx(36 / 64)


def test_each_picture_of_a_batch_has_its_own() -> None:
    """Rows are branches of pictures; all compute equally many tokens, so the larger mask decides how many."""
    masks = torch.cat((corner(4), corner(2).flip(1, 2)))
    _, computed = traced(Scene(rows=4, branches=HALVES), Plan(0.0, min_keep=0.0), Method(RandomRouter(), Reuse()), 4, Regions(protect=masks))
    later = computed[1:]
    assert later[:, :, [0, 2], :4, :4].all() and later[:, :, [0, 2]].mean() == 16 / 64
    assert later[:, :, [1, 3], -2:, -2:].all() and later[:, :, [1, 3]].mean() == 16 / 64


def test_frames_of_a_video() -> None:
    """One mask is on all of them, or each has its own; of a batch the videos follow one another."""
    masks = torch.cat([corner(size) for size in (1, 2, 0, 3, 0, 8)])
    each = Regions(protect=masks).on((3, SIDE, SIDE), 3 * 64)
    assert each.protect.shape == (2, 3 * 64) and each.protect.unflatten(1, (3, 64)).sum(2).tolist() == [[1, 4, 0], [9, 0, 64]]
    assert each.least == 73
    one = Regions(prefer=corner(2, value=0.5)).on((3, SIDE, SIDE), 3 * 64 + 5).prefer
    assert one.shape == (1, 197) and torch.equal(one[:, :192], Regions(prefer=corner(2, value=0.5)).on((SIDE, SIDE), 64).prefer.repeat(1, 3))
    assert not one[:, 192:].any()


def test_by_a_threshold_protected_tokens_are_computed_too() -> None:
    zones = Regions(protect=corner(2), prefer=corner(8)).on((SIDE, SIDE), 64)
    scores = torch.full((2, 64), -1.0)
    assert (zones.order(scores, by_threshold=True) > 0).sum() == 2 * 4


def test_preferred_tokens_go_before_others_of_the_same_worth() -> None:
    zones = Regions(prefer=corner(4)).on((SIDE, SIDE), 66)
    order = zones.order(torch.linspace(0, 1, 66)[None], by_threshold=False)
    to_top = 1 - torch.arange(66) / 66
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[:4, :4] = True
    nearer = torch.cat((inside.flatten(), torch.zeros(2, dtype=torch.bool))) * 0.75
    assert torch.allclose(order[0], -to_top * (1 - nearer))
    half = Regions(prefer=corner(4, value=0.5)).on((SIDE, SIDE), 66).order(torch.linspace(0, 1, 66)[None], False)
    assert torch.allclose(half[0], -to_top * (1 - nearer / 2))


@pytest.mark.parametrize("router, stand_in", ROUTERS[:1] + ROUTERS[2:], ids=NAMES[:1] + NAMES[2:])
def test_preference_moves_compute_and_keeps_the_budget(router: Router, stand_in: Nothing | Reuse) -> None:
    plan, method = Plan(0.5), Method(router, stand_in)
    runs = [traced(Scene(), plan, method, 8, regions) for regions in (Regions(), Regions(prefer=corner(4)))]
    (_, before), (run, after) = runs
    assert run.ledger.achieved == pytest.approx(0.5, abs=0.02)
    assert after[..., :4, :4].mean() > before[..., :4, :4].mean() + 0.1
    assert after[2:, ..., 4:, 4:].any(), "what is not preferred is not left out for good"


def test_what_is_not_preferred_is_not_left_out_for_good() -> None:
    """Three quarters of the picture preferred: every other token still has its turn in the second half of a run."""
    mask = torch.zeros(1, 64, 64)
    mask[:, :48] = 1.0
    _, computed = traced(Scene(), Plan(0.6), Method(ChangeRouter(), Reuse()), 28, Regions(prefer=mask))
    later = computed[14:].any((0, 1, 2))
    assert later[6:].all() and computed[14:, ..., :6, :].mean() > 1.5 * computed[14:, ..., 6:, :].mean()


@pytest.mark.parametrize("min_keep", [0.1, 0.3, 0.5])
def test_one_protected_token_costs_next_to_nothing_with_alternate_steps(min_keep: float) -> None:
    one = torch.zeros(1, SIDE, SIDE)
    one[:, 0, 0] = 1.0
    plan, method = Plan(0.6, min_keep=min_keep), Method(AlternateRouter(), Reuse())
    (before, _), (after, computed) = (traced(Scene(), plan, method, 20, regions) for regions in (Regions(), Regions(protect=one)))
    assert after.ledger.achieved == pytest.approx(before.ledger.achieved, abs=0.01)
    assert computed.mean((1, 2, 3, 4)).min() == 1 / 64 and computed[..., 0, 0].all()


def test_the_picture_is_the_masked_one() -> None:
    """Protected tokens in, skipping still equals masking."""
    scene = Scene(rows=2)
    recorder = Recorder()
    run = Run(Plan(0.5, min_keep=0.0), Method(ScriptedRouter([0.3] * BLOCKS), Nothing()), [1.0], recorder, Regions(protect=corner(3)))
    output = scene.evaluate(run, 1.0)
    run.finish()
    (evaluation,) = recorder.finish()
    assert difference(output, reference.forward(scene.model, scene.embed(1.0), torch.from_numpy(evaluation.mask()))) < 1e-5


def test_masks_of_any_size_are_stretched_over_the_tokens() -> None:
    wide = torch.zeros(1, 30, 50)
    wide[:, :, 25:] = 1.0
    protect = Regions(protect=wide).on((SIDE, SIDE), 70).protect[0]
    assert protect[:64].reshape(SIDE, SIDE).tolist() == [[False] * 4 + [True] * 4] * SIDE and not protect[64:].any()
    dot = torch.zeros(1, 256, 256)
    dot[:, 100, 100] = 1.0
    assert Regions(protect=dot).on((SIDE, SIDE), 64).least == 1, "a token with one protected pixel is protected"


def test_nothing_marked_changes_nothing() -> None:
    assert not Regions() and Zones().least == 0
    scores = torch.randn(1, 9)
    assert Zones().order(scores, False) is scores


@pytest.mark.parametrize("keep, protected, expected", [(0.0, 0, 0), (0.0, 70, 128), (0.05, 0, 448), (0.5, 70, 2048), (1.0, 70, 4096)])
def test_capacities_hold_what_is_protected(keep: float, protected: int, expected: int) -> None:
    assert capacity(keep, 4096, 0.1, protected) == expected


def test_a_branch_share_leaves_each_branch_what_is_protected() -> None:
    assert share_between(20, 64, 1, 1, 4.0) == (32, 8)
    assert share_between(20, 64, 1, 1, 4.0, protected=16) == (24, 16)
