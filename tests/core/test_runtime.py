"""What is skipped is as if masked afterwards, full capacity is the model itself, and nothing is left behind."""

from __future__ import annotations

import gc
import weakref
from copy import copy

import pytest
import reference
import torch
from toy import BLOCKS, ScriptedRouter, Scene, forwards, gaussian_router, schedule, scripted_scores, tiny_flux
from torch import Tensor, nn

from dydit_core.budget import Plan, share_between
from dydit_core.gather import gather, take_rows
from dydit_core.parts import Extent, Geometry, Router
from dydit_core.routers.change import ChangeRouter, ChangeState
from dydit_core.routers.random import RandomRouter
from dydit_core.runtime import Branches, Method, Run
from dydit_core.substitutes.history import Reuse, ReuseState
from dydit_core.substitutes.nothing import Nothing

PLAN = Plan(0.5, min_keep=0.0)
UNEVEN = (0.5, 0.0, 0.3, 1.0)
HALVES = Branches(("cfg",), slice(0, 2), slice(2, 4))
REVERSED = Branches(("cfg",), slice(2, 4), slice(0, 2))


def difference(one: Tensor, other: Tensor) -> float:
    """Largest difference, as a fraction of the largest value."""
    return float((one - other).abs().max() / other.abs().max())


def causal(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril()


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
@pytest.mark.parametrize("scene, share", [
    (dict(), 1.0),
    (dict(text=1), 1.0),
    (dict(rows=4, branches=HALVES), 1.0),
    (dict(rows=4, branches=HALVES), 1.6),
    (dict(rows=4, branches=REVERSED), 0.5),
    (dict(rows=2, mask=causal(69)[None, None]), 1.0),
    (dict(rows=4, branches=HALVES, mask=torch.randn(4, 1, 1, 69, generator=torch.Generator().manual_seed(5))), 2.0),
    (dict(rows=4, branches=HALVES, mask=torch.randn(4, 2, 69, 69, generator=torch.Generator().manual_seed(6))), 2.0),
    (dict(rows=2, mask=causal(69)), 1.0),
], ids=["one", "text 1", "cfg", "cfg 1.6", "uncond first", "mask shared", "mask per key", "mask per head", "mask 2d"])
def test_skipping_equals_masking(scene: dict, share: float, stand_in: Nothing | Reuse) -> None:
    scene, sigmas = Scene(**scene), schedule(4)
    plan = Plan(0.5, min_keep=0.0, branch_share=share)
    method = Method(ScriptedRouter(UNEVEN, needs_history=stand_in.needs_history), stand_in)
    _, outputs, trace = scene.run(plan, method, sigmas)
    history = {} if stand_in.needs_history else None
    for sigma, output, evaluation in zip(sigmas, outputs, trace):
        computed = torch.from_numpy(evaluation.mask())
        expected = reference.forward(scene.model, scene.embed(sigma), computed, history, scene.mask)
        assert difference(output, expected) < 1e-5
    assert not torch.from_numpy(trace[-1].mask()).all()


@pytest.mark.parametrize("share", [1.0, 1.6, 10.0])
def test_the_best_tokens_are_kept_and_as_many_as_were_planned(share: float) -> None:
    scene = Scene(rows=4, branches=HALVES)
    _, _, (evaluation,) = scene.run(Plan(0.5, min_keep=0.0, branch_share=share), Method(ScriptedRouter(UNEVEN), Nothing()), [1.0])
    for block, mask in enumerate(torch.from_numpy(evaluation.mask())):
        planned = round(UNEVEN[block] * 64)
        counts = mask.sum(1).tolist()
        assert counts[0] == counts[1] and counts[2] == counts[3]
        assert abs(sum(counts) - 4 * planned) <= 2
        if 0 < planned < 64:
            assert counts[0] == 64 or abs(counts[0] - share * counts[2]) <= 1 + share
        scores = scripted_scores(block, 1.0, 4, 64)
        for row, chosen in enumerate(mask):
            assert chosen.all() or not chosen.any() or scores[row][chosen].min() >= scores[row][~chosen].max()


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
@pytest.mark.parametrize("mask", [None, causal(69)[None, None]], ids=["no mask", "mask"])
def test_full_capacity_is_the_models_own_forward(stand_in: Nothing | Reuse, mask: Tensor | None) -> None:
    scene = Scene(rows=2, mask=mask)
    run = Run(Plan(1.0), Method(ScriptedRouter([1.0] * BLOCKS), stand_in), schedule(2))
    for sigma in schedule(2):
        entering = scene.embed(sigma)
        own = scene.blocks(*entering)
        assert difference(scene.evaluate(run, sigma), own) < 1e-6
    assert run.ledger.achieved == 1.0


def test_a_block_leaves_its_inputs_alone() -> None:
    scene = Scene()
    run = Run(PLAN, Method(ScriptedRouter(UNEVEN), Nothing()), [1.0])
    run.arrive(1.0)
    seen: list[tuple[Tensor, Tensor]] = []

    def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.extend((x, x.clone()) for x in (*args, kwargs.get("img"), kwargs.get("txt")) if x is not None)

    for block in scene.model.single_blocks:
        block.register_forward_pre_hook(look, with_kwargs=True)
    for block in scene.model.double_blocks:
        block.register_forward_pre_hook(look, with_kwargs=True)
    with scene.passing(run):
        scene.blocks(*scene.embed(1.0))
    assert len(seen) == 2 + 3
    for now, before in seen:
        assert torch.equal(now, before)


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_models_forwards_come_back(error: type[BaseException] | None) -> None:
    scene = Scene()
    mine = scene.model.double_blocks[0].forward
    scene.model.double_blocks[0].forward = mine  # another pack's instance attribute must survive
    before = forwards(scene.model)
    run = Run(PLAN, Method(ScriptedRouter(UNEVEN), Nothing()), [1.0])
    run.arrive(1.0)
    with pytest.raises(error) if error else torch.no_grad():
        with scene.passing(run):
            assert all(forwards(scene.model)) and forwards(scene.model)[0] is not mine
            scene.blocks(*scene.embed(1.0))
            if error:
                raise error
    assert forwards(scene.model) == before
    run.finish()
    assert len(run.ledger.spent) == (0 if error else 1)


def test_the_same_stand_in_every_time() -> None:
    scene, seen = Scene(), []
    run = Run(PLAN, Method(ScriptedRouter(UNEVEN), Nothing()), schedule(2))
    for sigma in schedule(2):
        run.arrive(sigma)
        with scene.passing(run):
            seen.append(forwards(scene.model))
            scene.blocks(*scene.embed(sigma))
    assert seen[0] == seen[1]


def test_outside_the_window_the_model_is_untouched_and_booked_dense() -> None:
    scene, sigmas = Scene(), schedule(5)
    run = Run(Plan(0.5, start_sigma=0.7, end_sigma=0.3, min_keep=0.0), Method(ScriptedRouter([0.0] * BLOCKS), Nothing()), sigmas)
    swapped = []
    for sigma in sigmas:
        run.arrive(sigma)
        with scene.passing(run):
            swapped.append(any(forwards(scene.model)))
            scene.blocks(*scene.embed(sigma))
    run.finish()
    assert swapped == [False, False, True, True, False]
    assert [spent == 1.0 for spent in run.ledger.spent] == [True, True, False, False, True]


def test_history_starts_with_all_tokens_also_before_the_window() -> None:
    scene, sigmas = Scene(), schedule(4)
    _, _, trace = scene.run(Plan(0.6, start_sigma=0.6), Method(ChangeRouter(), Reuse()), sigmas)
    assert [evaluation.computed == 1.0 for evaluation in trace] == [True, True, False, False]


def test_a_sigma_that_rises_again_drops_history() -> None:
    scene = Scene()
    sigmas = [1.0, 0.6, 0.3, 0.8, 0.4]
    _, outputs, trace = scene.run(Plan(0.6), Method(ChangeRouter(), Reuse()), schedule(4), sigmas)
    assert [evaluation.computed == 1.0 for evaluation in trace] == [True, False, False, True, False]
    assert difference(outputs[3], scene.blocks(*scene.embed(0.8))) < 1e-6


def test_branches_have_their_own_history() -> None:
    cond, uncond = Scene(branches=Branches(("cond",), slice(0, 1), slice(1, 1))), Scene(branches=Branches(("uncond",), slice(0, 0), slice(0, 1)))
    uncond.context = uncond.context.flip(1)
    uncond.model = cond.model
    run = Run(Plan(0.6), Method(ChangeRouter(), Reuse()), schedule(3))
    alone = Run(Plan(0.6), Method(ChangeRouter(), Reuse()), schedule(3))
    for sigma in schedule(3):
        run.arrive(sigma)
        outputs = []
        for branch in (cond, uncond):
            with branch.passing(run):
                outputs.append(branch.blocks(*branch.embed(sigma)))
        assert torch.equal(outputs[1], uncond.evaluate(alone, sigma))
    run.finish()
    alone.finish()
    assert len(run.ledger.spent) == 3
    assert run.ledger.achieved == pytest.approx(alone.ledger.achieved)


def alone(scene: Scene, rows: list[int], cond: slice, uncond: slice) -> Scene:
    """A pass over some rows of `scene`, in this order; the row numbers are the branches' keys."""
    part = copy(scene)
    part.rows, part.branches = len(rows), Branches(tuple(rows), cond, uncond)
    part.picture, part.noise, part.context, part.pooled = (x[rows] for x in (scene.picture, scene.noise, scene.context, scene.pooled))
    return part


@pytest.mark.parametrize("router", [ChangeRouter(), RandomRouter(), gaussian_router()], ids=["change", "random", "token"])
def test_history_follows_a_branch_into_any_batch(router: Router) -> None:
    """A host short of memory splits cond and uncond, and joins them again in another order."""
    scene, method, sigmas = Scene(rows=2), Method(router, Reuse()), schedule(6)
    none, first, second = slice(0, 0), slice(0, 1), slice(1, 2)
    pair, swap = alone(scene, [0, 1], first, second), alone(scene, [1, 0], second, first)
    cond, uncond = alone(scene, [0], first, none), alone(scene, [1], none, first)
    run, expected = Run(Plan(0.5), method, sigmas), Run(Plan(0.5), method, sigmas)
    for sigma, passes in zip(sigmas, ([pair], [uncond, cond], [swap], [pair], [cond, uncond], [pair])):
        run.arrive(sigma)
        found = {}
        for part in passes:
            with part.passing(run):
                found.update(zip(part.branches.keys, part.blocks(*part.embed(sigma))))
        together = pair.evaluate(expected, sigma)
        if not isinstance(router, RandomRouter):
            assert difference(torch.stack([found[0], found[1]]), together) < 1e-5
        last = [last.untyped_storage() for stream in run._streams._streams.values() for last in stream.substitute.last.values()]
        held = {storage.data_ptr(): storage.nbytes() for storage in last}
        assert sum(held.values()) == 2 * Reuse().row_bytes(Extent(scene.geometry, BLOCKS, 6, 1, 4))
    run.finish()
    assert [spent == 1.0 for spent in run.ledger.spent] == [True] + [False] * 5
    assert run.ledger.achieved == pytest.approx(0.5, abs=0.02)


def test_a_branch_without_history_makes_its_batch_dense() -> None:
    """The others begin again with it; nobody's memory is kept twice, and what they leave behind is dropped."""
    scene, none = Scene(rows=3), slice(0, 0)
    run = Run(Plan(0.5), Method(ChangeRouter(), Reuse()), schedule(4))
    for sigma, rows, dense in ((1.0, [0, 1], True), (0.75, [1, 2], True), (0.5, [0], False), (0.25, [2, 1], False)):
        run.arrive(sigma)
        part = alone(scene, rows, slice(0, len(rows)), none)
        with part.passing(run):
            part.blocks(*part.embed(sigma))
        run._settle()
        assert (run.ledger.spent[-1] == 1.0) == dense
    assert sorted(home[0] for home in run._streams._streams) == [(0,), (2, 1)]


def test_two_runs_on_one_model_are_two_runs() -> None:
    scene, method, sigmas = Scene(), Method(ChangeRouter(), Reuse()), schedule(3)
    one, other = Run(Plan(0.6), method, sigmas), Run(Plan(0.8), method, sigmas)
    both = [(scene.evaluate(one, sigma), scene.evaluate(other, sigma)) for sigma in sigmas]
    for index, budget in enumerate((0.6, 0.8)):
        _, alone, _ = scene.run(Plan(budget), method, sigmas)
        assert all(torch.equal(pair[index], single) for pair, single in zip(both, alone))


def test_nothing_is_left_after_the_run() -> None:
    def states() -> set[int]:
        return {id(thing) for thing in gc.get_objects() if type(thing) in (ReuseState, ChangeState)}

    scene, before = Scene(), states()
    run, _, _ = scene.run(Plan(0.6), Method(ChangeRouter(), Reuse()), schedule(3))
    gc.collect()
    assert states() <= before, "a run that has ended keeps its history"
    model = weakref.ref(scene.model)
    del scene
    gc.collect()
    assert model() is None, "a run keeps the model alive"
    assert run.ledger.achieved < 1.0


def test_another_token_count_is_refused_by_name() -> None:
    scene = Scene()
    scene.geometry = Geometry(60, 5, 32)
    run = Run(PLAN, Method(ScriptedRouter(UNEVEN), Nothing()), [1.0])
    with pytest.raises(ValueError, match="64 image tokens where 60 were expected.*budget to 1.0"):
        scene.evaluate(run, 1.0)


def test_reference_at_another_timestep_is_refused() -> None:
    scene = Scene()
    run = Run(PLAN, Method(ScriptedRouter(UNEVEN), Nothing()), [1.0])
    run.arrive(1.0)
    img, txt, vec, pe = scene.embed(1.0)
    with pytest.raises(ValueError, match="index_timestep_zero"), scene.passing(run):
        scene.model.double_blocks[0](img=img, txt=txt, vec=vec, pe=pe, modulation_dims_img=[(0, 3, 0)])


@pytest.mark.parametrize("kept", [0, 1, 7, 10])
def test_gathered_tokens_are_those_of_their_row(kept: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 12, 4)[:, 1:11]  # not contiguous, as a split of [text, image] is
    index = torch.rand(3, 10).topk(kept, dim=1).indices.sort(1).values
    expected = torch.stack([row[chosen] for row, chosen in zip(x, index)])
    assert torch.equal(gather(x, index), expected)
    assert torch.equal(gather(x[..., 0], index), expected[..., 0])


@pytest.mark.parametrize("shared", [True, False])
def test_take_rows(shared: bool) -> None:
    table = torch.randn(1 if shared else 3, 1, 10, 2, 2)
    index = torch.tensor([[0, 4], [1, 9], [2, 3]])
    taken = take_rows(table, index, 2)
    for row, tokens in enumerate(index):
        assert torch.equal(taken[row], table[0 if shared else row][:, tokens])


@pytest.mark.parametrize("kept, rows, share", [(30, (1, 1), 1.5), (30, (2, 1), 0.4), (60, (1, 1), 3.0), (1, (1, 2), 2.0), (5, (1, 0), 2.0)])
def test_shares_sum_to_what_is_kept(kept: int, rows: tuple[int, int], share: float) -> None:
    cond, uncond = share_between(kept, 64, *rows, share)
    assert 0 <= cond <= 64 and 0 <= uncond <= 64
    assert abs(cond * rows[0] + uncond * rows[1] - kept * sum(rows)) <= max(rows)


def test_a_model_of_another_kind_is_refused_with_a_reason() -> None:
    from toy import FAMILY
    assert FAMILY.refusal(tiny_flux()) is None
    assert "no FLUX blocks" in FAMILY.refusal(nn.Linear(2, 2))
    relative = tiny_flux()
    relative.double_blocks[0].img_mlp[1] = nn.SiLU()
    assert "gated MLP" in FAMILY.refusal(relative)
