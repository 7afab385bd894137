"""Tokens, heads and channel groups of a Latte: decided in spatial and temporal blocks by every router, equal to masks, at any budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import numpy as np
import pytest
import torch
from test_runtime import HALVES, difference
from torch import Tensor
from toy import counted_run, schedule
from toy_dit import GROUPS, HEADS, reference
from toy_dit import routers as dit_routers
from toy_latte import BLOCKS, CONFIG, FAMILY, TOKENS, LatteScene, sees, tiny_latte

from dydit_core.budget import Plan
from dydit_core.regions import Regions
from dydit_core.routers.change import ChangeRouter
from dydit_core.routers.dit import DiTRouters
from dydit_core.routers.learned import LearnedRouter
from dydit_core.routers.token import CapacityTable, TokenScores
from dydit_core.routers.width import new_width_scores
from dydit_core.runtime import Method, Run
from dydit_core.sampling import eps_sigmas, sample
from dydit_core.standalone import Budgeted
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing
from dydit_core.td_lora import TimestepLoRA, new_low_rank
from dydit_core.trace import Evaluation


def routers(**changed: object) -> DiTRouters:
    return dit_routers(blocks=BLOCKS, **changed)


@cache
def low_rank() -> TimestepLoRA:
    torch.manual_seed(4)
    sizes = {(index, name): (layer.in_features, layer.out_features)
             for index, block in enumerate(FAMILY.blocks(tiny_latte())) for name, layer in FAMILY.layers(block).items()}
    added = new_low_rank(sizes, BLOCKS, rank=3, experts=2).requires_grad_(False)
    for up in added.up:
        up.normal_(0, 0.2)
    return added


@cache
def learned() -> LearnedRouter:
    """An adapter's token scores with the table of gaussian logits around each bias, and its widths."""
    torch.manual_seed(3)
    scores = TokenScores(BLOCKS, CONFIG.hidden_size, rank=4, text=False).requires_grad_(False)
    scores.bias.copy_(torch.linspace(-1.0, 1.0, BLOCKS))
    quantiles = torch.special.ndtri(torch.linspace(0, 1, 33).clamp(1e-3, 1 - 1e-3)) + scores.bias[:, None, None]
    widths = new_width_scores(BLOCKS, HEADS, GROUPS, spread=1.0).requires_grad_(False)
    widths.heads.add_(torch.randn(widths.heads.shape))
    return LearnedRouter(scores, CapacityTable(quantiles.expand(-1, 4, -1), torch.linspace(0.25, 1, 4)), widths)


def masks_of(evaluation: Evaluation) -> dict[int, tuple[Tensor, Tensor]]:
    heads, groups = torch.from_numpy(evaluation.heads.values()), torch.from_numpy(evaluation.groups.values())
    return {block: (heads[block], groups[block]) for block in range(BLOCKS)}


METHODS = {
    "learned": Method(learned(), Nothing()),
    "learned, reuse": Method(learned(), Reuse()),
    "released": Method(routers(), Nothing()),
    "released, reuse": Method(routers(), Reuse()),
    "released, December": Method(routers(always_on=False), Nothing()),
    "released, own threshold": Method(routers().by_threshold(), Nothing()),
}


@pytest.mark.parametrize("name", METHODS)
def test_leaving_out_equals_masking(name: str) -> None:
    """Heads, channel groups and tokens, in a spatial and in a temporal block: of an attention over the whole video, computed and masked."""
    scene, method = LatteScene(rows=4, branches=HALVES), METHODS[name]
    _, outputs, trace = scene.run(Plan(0.6, branch_share=1.5), method, schedule(4))
    history = {} if method.substitute.needs_history else None
    for sigma, output, evaluation in zip(schedule(4), outputs, trace):
        computed, widths = torch.from_numpy(evaluation.mask()), masks_of(evaluation)
        assert difference(output, reference(scene.model, scene.embed(sigma), computed, history, widths, sees())) < 1e-5
    last = trace[-1]
    assert (last.mask().mean((1, 2)) < 1).any() and not last.heads.values().all() and not last.groups.values().all()


@pytest.mark.parametrize("kind", ["tokens", "heads", "groups"])
def test_both_kinds_of_block_leave_out(kind: str) -> None:
    trace = LatteScene(rows=2).run(Plan(0.5), Method(routers().by_threshold(), Nothing()), schedule(6))[2]
    on = np.array([{"tokens": lambda one: one.mask().mean((1, 2)), "heads": lambda one: one.heads.values().mean(1),
                    "groups": lambda one: one.groups.values().mean(1)}[kind](evaluation) for evaluation in trace]).min(0)
    assert (on[0::2] < 1).any() and (on[1::2] < 1).any(), "spatial and temporal blocks"


def test_low_rank_additions_are_the_formula() -> None:
    """In every layer of both kinds of block: the same as adding them to its weights."""
    scene, added, sigma = LatteScene(rows=2), low_rank(), 0.55
    method = Method(LearnedRouter(low_rank=added), Nothing())
    got = scene.evaluate(Run(Plan(0.9), method, [sigma]), sigma)
    level = FAMILY.level(scene.model, torch.tensor([sigma]))
    entering = scene.embed(sigma)
    dense = scene.blocks(*entering)
    for (block, layer), down, up in zip(added.keys, added.down, added.up):
        omega = added.weights(level)[0, block]
        scene.model.blocks[block].get_submodule(layer).weight.add_(torch.einsum("n,nor->or", omega, up) @ down[0])
    assert difference(got, scene.blocks(*entering)) < 1e-5 < difference(got, dense)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("kind", ["learned", "released", "released, December", "changed"])
def test_a_budget_is_met(kind: str, budget: float) -> None:
    """Counted FLOPs, the routers' too, are those booked and those asked for; a run with a dense first evaluation as well."""
    method = Method(ChangeRouter(), Reuse()) if kind == "changed" else METHODS[kind]
    run, spent = counted_run(LatteScene(rows=2), Plan(budget), method, schedule(12))
    assert spent == pytest.approx(run.ledger.achieved, rel=2e-3)
    assert spent == pytest.approx(budget, rel=0.02)


def test_low_rank_additions_are_booked() -> None:
    router = replace(learned(), low_rank=low_rank())
    run, spent = counted_run(LatteScene(rows=2), Plan(0.75), Method(router, Nothing()), schedule(12))
    assert spent == pytest.approx(run.ledger.achieved, rel=5e-3) and spent == pytest.approx(0.75, rel=0.02)


def test_protected_places_are_computed_in_every_frame_of_every_block() -> None:
    """A mask for one frame holds for all of them: also where a temporal block decides."""
    scene = LatteScene(rows=2)
    protect = torch.zeros(1, CONFIG.side * 8, CONFIG.side * 8)
    protect[:, : CONFIG.side * 4, : CONFIG.side * 4] = 1.0
    recorded = []
    with Budgeted(scene.model, Plan(0.6), Method(ChangeRouter(), Reuse()), eps_sigmas(6), recorded.append) as budgeted:
        budgeted.run.regions = Regions(protect=protect)
        sample(budgeted, (scene.labels,), scene.noise * eps_sigmas(6)[0], 6, schedule=eps_sigmas(6))
    masks = recorded[-1].mask().reshape(BLOCKS, 2, CONFIG.frames, CONFIG.side // 2, CONFIG.side // 2)
    half = CONFIG.side // 4
    assert masks[..., :half, :half].all() and not masks[..., half:, :].all() and recorded[-1].frames == CONFIG.frames


# --- without a host

@pytest.mark.parametrize("classes", [5, 0])
def test_a_latte_samples_under_a_budget(classes: int) -> None:
    model, levels = tiny_latte(config=replace(CONFIG, classes=classes)), eps_sigmas(6)
    given, none = ((torch.tensor([1, 4]),), (torch.tensor([5]),)) if classes else ((), ())
    noise = torch.randn(2, 4, CONFIG.frames, CONFIG.side, CONFIG.side, generator=torch.Generator().manual_seed(0)) * levels[0]
    seen: list[Evaluation] = []
    run = partial(sample, noise=noise, steps=6, cfg=2.0 if classes else 1.0, uncond=none, schedule=levels)
    with Budgeted(model, Plan(0.7), Method(ChangeRouter(), Reuse()), levels, seen.append) as budgeted:
        found = run(budgeted, given)
    dense = run(model.denoise_direction, given)
    assert found.shape == noise.shape and 0 < difference(found, dense) < 1
    assert budgeted.spent.achieved == pytest.approx(0.7, rel=0.02)
    assert len(seen) == 6 and seen[0].shape == (BLOCKS, 4 if classes else 2, TOKENS) and seen[0].frames == CONFIG.frames
    with Budgeted(model, Plan(1.0), Method(LearnedRouter(), Nothing()), levels) as open_:
        assert difference(run(open_, given), dense) < 1e-5
