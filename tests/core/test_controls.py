"""The untrained controls of the quality tables: layer skip and widths by magnitude."""

from __future__ import annotations

import pytest
import torch
from toy import BLOCKS, CONFIG, Scene, counted_run, schedule, tiny_flux

from dydit_core.bench import influence
from dydit_core.bench.magnitude import magnitude_widths
from dydit_core.budget import Plan
from dydit_core.demo.prompt import CONTEXT_DIM, POOLED_DIM
from dydit_core.models.flux import Flux, FluxConfig
from dydit_core.routers.learned import LearnedRouter
from dydit_core.routers.skip import SkipRouter
from dydit_core.routers.width import kept
from dydit_core.runtime import Method
from dydit_core.substitutes.nothing import Nothing

ORDER = (2, 0, 3, 1)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5, 0.35])
def test_layer_skip_meets_the_budget_with_whole_blocks(budget: float) -> None:
    scene, method = Scene(), Method(SkipRouter(ORDER), Nothing())
    run, spent = counted_run(scene, Plan(budget), method, schedule(8))
    assert spent == pytest.approx(run.ledger.achieved, rel=0.005) == pytest.approx(budget, abs=0.01)
    _, _, trace = scene.run(Plan(budget), method, schedule(8))
    shares = [evaluation.mask()[list(ORDER), 0].mean(-1).tolist() for evaluation in trace]
    for share in shares:
        assert share == sorted(share), "those first in the order are left out first"
        assert sum(0.0 < part < 1.0 for part in share) <= 1, "all blocks but one are whole or skipped"
    assert min(share[0] for share in shares) < 1.0


def test_layer_skip_may_leave_out_every_token_in_spite_of_min_keep() -> None:
    _, _, trace = Scene().run(Plan(0.0, min_keep=0.1), Method(SkipRouter(ORDER), Nothing()), schedule(2))
    assert not any(evaluation.mask().any() for evaluation in trace)


def test_the_block_that_adds_nothing_has_no_influence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(influence, "PROMPTS", 1)
    torch.manual_seed(0)
    model = Flux(FluxConfig(hidden_size=32, depth=1, depth_single_blocks=3, context_in_dim=CONTEXT_DIM, vec_in_dim=POOLED_DIM, axes_dim=(4, 6, 6)))
    model.requires_grad_(False)
    model.single_blocks[1].linear2.weight.zero_()
    model.single_blocks[1].linear2.bias.zero_()
    model.single_blocks[2].linear2.weight.mul_(5.0)
    found = influence.influence(model)
    assert len(found) == 4 and found[2] == pytest.approx(0.0, abs=1e-6)
    order = influence.least_first(model)
    assert order[0] == 2 and order[-1] == 3 and sorted(order) == list(range(4))


def test_what_weighs_nothing_goes_first() -> None:
    """Head 1 of the double block and of single block 1, and channel group 3 of both, are zero."""
    model, head, group = tiny_flux(), slice(16, 32), slice(48, 64)
    double, single = model.double_blocks[0], model.single_blocks[1]
    for attention in (double.img_attn, double.txt_attn):
        attention.qkv.weight.view(3, 32, 32)[:, head] = 0
        attention.proj.weight[:, head] = 0
    single.linear1.weight[:96].view(3, 32, 32)[:, head] = 0
    single.linear2.weight[:, head] = 0
    double.img_mlp[0].weight[group] = 0
    double.img_mlp[2].weight[:, group] = 0
    single.linear1.weight[96:][group] = 0
    single.linear2.weight[:, 32:][:, group] = 0
    heads, groups = magnitude_widths(model, groups=8)(torch.tensor([0.3]))
    assert heads.shape == (1, BLOCKS, CONFIG.num_heads) and groups.shape == (1, BLOCKS, 8)
    assert (heads[0] == 0).nonzero().tolist() == [[0, 1], [2, 1]] and (groups[0] == 0).nonzero().tolist() == [[0, 3], [2, 3]]
    assert not kept(heads[0], -1e-3)[[0, 2], 1].any() and kept(heads[0], -1e-3).sum() == 2 * BLOCKS - 2


def test_kinds_of_layers_weigh_alike() -> None:
    model = tiny_flux()
    before = magnitude_widths(model, groups=8).groups.clone()
    for block in model.single_blocks:
        block.linear2.weight[:, 32:].mul_(100.0)
    torch.testing.assert_close(magnitude_widths(model, groups=8).groups, before)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5])
def test_widths_by_magnitude_meet_the_budget(budget: float) -> None:
    method = Method(LearnedRouter(width=magnitude_widths(tiny_flux(), groups=32)), Nothing())
    run, spent = counted_run(Scene(), Plan(budget), method, schedule(8))
    assert spent == pytest.approx(run.ledger.achieved, rel=0.005) == pytest.approx(budget, abs=0.02)
