"""Heads and channel groups that are off are not computed, and the result is as if they had been masked."""

from __future__ import annotations

from weakref import ref

import pytest
import reference
import torch
from test_runtime import HALVES, UNEVEN, difference
from torch import nn
from toy import BACKEND, BLOCKS, CONFIG, FAMILY, ScriptedRouter, Scene, counted_run, gaussian_router, schedule

from dydit_core.backend import TorchBackend
from dydit_core.budget import Plan
from dydit_core.families.linear import channels, joined
from dydit_core.layouts import Layouts
from dydit_core.parts import Outlook, Setting, Width
from dydit_core.routers.learned import LearnedRouter
from dydit_core.routers.width import WidthScores, fraction_kept, kept, new_width_scores, widths
from dydit_core.runtime import Method, Run
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing
from dydit_core.td_lora import TimestepLoRA, new_low_rank

HEADS, GROUPS = CONFIG.num_heads, 8


def chosen(seed: int = 0) -> tuple[list[Width], reference.Widths]:
    """Random widths of all blocks, as indices for us and as masks for the reference."""
    generator = torch.Generator().manual_seed(seed)
    heads = torch.rand(BLOCKS, HEADS, generator=generator) < 0.5
    groups = torch.rand(BLOCKS, GROUPS, generator=generator) < 0.5
    heads[:, 0] |= ~heads.any(1)
    groups[:, 0] |= ~groups.any(1)
    return widths(heads, groups), {block: (heads[block], groups[block]) for block in range(BLOCKS)}


class WholeBackend(TorchBackend):
    """No layer can be cut."""

    def unsliceable(self, linear: nn.Module) -> str | None:
        return "its weights are quantised"


def low_rank(seed: int = 0, experts: int = 2) -> TimestepLoRA:
    torch.manual_seed(seed)
    sizes = {(index, name): (layer.in_features, layer.out_features)
             for index, block in enumerate(FAMILY.blocks(Scene().model)) for name, layer in FAMILY.layers(block).items()}
    added = new_low_rank(sizes, BLOCKS, rank=3, experts=experts).requires_grad_(False)
    for up in added.up:
        up.normal_(0, 0.2)
    return added


@pytest.mark.parametrize("keep", [[1.0] * BLOCKS, UNEVEN], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("backend", [BACKEND, WholeBackend()], ids=["cut", "whole"])
@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
def test_cutting_equals_masking(keep: list[float], backend: TorchBackend, stand_in: Nothing | Reuse,
                                monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toy.BACKEND", backend)
    scene, (some, masks) = Scene(rows=4, branches=HALVES), chosen()
    router = ScriptedRouter(keep, stand_in.needs_history, some)
    _, outputs, trace = scene.run(Plan(0.5, min_keep=0.0), Method(router, stand_in), schedule(3))
    history = {} if stand_in.needs_history else None
    for index, (sigma, output, evaluation) in enumerate(zip(schedule(3), outputs, trace)):
        computed = torch.from_numpy(evaluation.mask())
        full = stand_in.needs_history and index == 0
        expected = reference.forward(scene.model, scene.embed(sigma), computed, history, widths={} if full else masks)
        assert difference(output, expected) < 1e-5


@pytest.mark.parametrize("keep", [[1.0] * BLOCKS, UNEVEN], ids=["all tokens", "some tokens"])
def test_a_mask_of_each_head_stays_with_its_head(keep: list[float]) -> None:
    some, masks = chosen()
    mask = torch.randn(1, HEADS, 69, 69, generator=torch.Generator().manual_seed(4))
    scene = Scene(rows=2, mask=mask)
    _, (output,), (evaluation,) = scene.run(Plan(0.5, min_keep=0.0), Method(ScriptedRouter(keep, widths=some), Nothing()), [1.0])
    expected = reference.forward(scene.model, scene.embed(1.0), torch.from_numpy(evaluation.mask()), mask=mask, widths=masks)
    assert difference(output, expected) < 1e-5


@pytest.mark.parametrize("keep", [[1.0] * BLOCKS, UNEVEN], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("backend, added", [(BACKEND, None), (BACKEND, low_rank()), (WholeBackend(), None)],
                         ids=["cut", "low rank", "whole"])
def test_what_is_off_costs_nothing(keep: list[float], added: TimestepLoRA | None, backend: TorchBackend,
                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs that torch counts are those that are booked."""
    monkeypatch.setattr("toy.BACKEND", backend)
    router = ScriptedRouter(keep, widths=chosen()[0])
    router.low_rank = added
    scene = Scene()
    scene.costs = FAMILY.costs(scene.model, scene.geometry, backend)
    run, spent = counted_run(scene, Plan(0.5, min_keep=0.0), Method(router, Nothing()), [1.0])
    assert spent == pytest.approx(run.ledger.achieved, rel=5e-3 if added else 1e-6)
    assert run.ledger.achieved < (0.95 if backend is BACKEND else 1.1)


def test_widths_follow_sigma_in_straight_lines() -> None:
    heads = torch.tensor([[[0.0, 1.0]], [[2.0, 3.0]], [[10.0, -5.0]]])
    scores = WidthScores(heads, torch.zeros(3, 1, 4))
    got, _ = scores(torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0, 7.0]))
    assert got[:, 0].tolist() == [[0, 1], [1, 2], [2, 3], [6, -1], [10, -5], [10, -5]]


def test_one_unit_is_always_on() -> None:
    on = kept(torch.tensor([[-3.0, -1.0, -2.0], [4.0, 5.0, 6.0]]), shift=-5.0)
    assert on.tolist() == [[False, True, False], [False, False, True]]
    assert kept(torch.tensor([-3.0, -1.0]), shift=2.0).tolist() == [False, True]
    logits = torch.randn(4, 6, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for shift in (-4.0, -2.0, 0.0, 2.0):
        torch.testing.assert_close(fraction_kept(logits.sort(-1).values, shift), kept(logits, shift).double().mean(-1))
    only, whole = widths(torch.tensor([[True, False], [True, True]]), torch.ones(2, 3, dtype=torch.bool))
    assert only.heads.tolist() == [0] and only.groups is None and only.fractions == (0.5, 1.0)
    assert whole.heads is None


def wide_router(tokens: bool = False, groups: int = 32, added: TimestepLoRA | None = None) -> LearnedRouter:
    torch.manual_seed(4)
    width = new_width_scores(BLOCKS, HEADS, groups, spread=1.0).requires_grad_(False)
    width.groups.add_(torch.linspace(-1, 1, 9).view(-1, 1, 1) * torch.randn(1, BLOCKS, groups))
    known = gaussian_router()
    return LearnedRouter(known.scores if tokens else None, known.table if tokens else None, width, low_rank=added)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.5])
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("kind", ["widths", "both", "both, low rank", "both, reuse"])
def test_widths_and_tokens_meet_the_budget(kind: str, steps: int, budget: float) -> None:
    router = wide_router("both" in kind, added=low_rank() if "low rank" in kind else None)
    method = Method(router.for_reuse(), Reuse()) if "reuse" in kind else Method(router, Nothing())
    run, spent = counted_run(Scene(), Plan(budget), method, schedule(steps))
    # Mixing the experts is not booked: at the width of a real model it is next to nothing.
    assert spent == pytest.approx(run.ledger.achieved, rel=6e-3 if "low rank" in kind else 1e-3)
    floored = kind == "both, reuse" and (steps, budget) == (4, 0.5)
    assert abs(spent - budget) < 0.02 * budget or floored


def test_gates_of_all_kinds_move_along_one_shift() -> None:
    """Less budget takes tokens, heads and groups away, and never gives one back."""
    scene, state = Scene(), wide_router(tokens=True).start(Setting(()))
    looks = [Outlook(torch.tensor([0.5]), share, 0, 0.0, 0.0, scene.costs, 64) for share in (0.95, 0.8, 0.6, 0.45)]
    allotments = [state.keep(look) for look in looks]
    for more, less in zip(allotments, allotments[1:]):
        assert (less.tokens <= more.tokens).all() and less.tokens.sum() < more.tokens.sum()
        for many, few in zip(more.widths, less.widths):
            assert few.groups is not None and set(few.groups.tolist()) <= set(range(32) if many.groups is None else many.groups.tolist())
    assert sum(width.fractions[0] for width in allotments[-1].widths) < BLOCKS
    for look, allotment in zip(looks, allotments):
        assert float(look.cost(allotment)) == pytest.approx(look.share, abs=0.05)


ROWS, COLUMNS, SIX = ((1, 2), (4, 6)), ((0, 1), (5, 6)), ((0, 6),)


def test_a_cut_is_made_once_while_the_choice_stays() -> None:
    weight, bias, layouts = torch.randn(8, 6), torch.randn(8), Layouts()
    cut, cut_bias = layouts.cut("a", weight, bias, ROWS, COLUMNS)
    assert torch.equal(cut, weight[[1, 4, 5]][:, [0, 5]]) and torch.equal(cut_bias, bias[[1, 4, 5]])
    assert layouts.cut("a", weight, bias, ROWS, COLUMNS)[0] is cut
    other, _ = layouts.cut("a", weight, bias, ROWS, ((0, 1), (4, 5)))
    assert torch.equal(other, weight[[1, 4, 5]][:, [0, 4]]) and other.data_ptr() == cut.data_ptr(), "in the room of the one before"
    weight.mul_(2)
    fresh, _ = layouts.cut("a", weight, bias, ROWS, ((0, 1), (4, 5)))
    assert torch.equal(fresh, weight[[1, 4, 5]][:, [0, 4]]), "a patched weight is cut again"
    assert layouts.held == fresh.nbytes
    wider, _ = layouts.cut("a", weight, bias, ROWS, SIX)
    assert torch.equal(wider, weight[[1, 4, 5]]) and layouts.held == wider.nbytes
    assert layouts.cut("b", weight, None, ((2, 4),), SIX)[0].data_ptr() == weight[2:4].data_ptr(), "one run is a view"


def test_a_weight_that_hides_that_it_changed_is_cut_again() -> None:
    weight, layouts = torch.zeros(8, 6), Layouts()
    layouts.cut("a", weight, None, ROWS, SIX)
    weight.data.fill_(1)  # as a host does that writes a scheduled LoRA into the weight
    assert layouts.cut("a", weight, None, ROWS, SIX)[0].eq(0).all(), "nothing showed"
    layouts.forget()
    assert layouts.cut("a", weight, None, ROWS, SIX)[0].eq(1).all()


def test_layouts_hold_no_more_than_their_limit() -> None:
    weight, layouts = torch.randn(8, 6), Layouts(limit=100)
    cuts = [layouts.cut(key, weight, None, ((0, 1), (key + 2, key + 3)), SIX)[0] for key in range(5)]
    assert layouts.held == 96
    assert all(torch.equal(cuts[key], weight[[0, key + 2]]) for key in (0, 1, 4))
    assert cuts[2].data_ptr() == cuts[3].data_ptr() == cuts[4].data_ptr(), "the rest share one room"


def test_weights_made_for_each_call_are_neither_held_nor_kept_alive() -> None:
    layouts = Layouts()
    for scale in (1.0, 2.0, 3.0):
        weight = torch.full((8, 6), scale)
        alive = ref(weight)
        assert layouts.cut("a", weight, None, ROWS, SIX)[0].eq(scale).all()
        del weight
        assert alive() is None
    assert layouts.held == 0


def test_runs_of_channels() -> None:
    assert channels(torch.tensor([0, 2, 3]), 4, 16, start=100) == ((100, 104), (108, 116))
    assert channels(None, 4, 16, start=100) == ((100, 116),)
    assert joined(((0, 4), (4, 8), (9, 10))) == ((0, 8), (9, 10))


def test_low_rank_additions_are_the_formula() -> None:
    """W₀x + Σ ωₙ(t) Bₙ A x on every layer: the same as a model whose weights have it merged in."""
    scene, added, sigma = Scene(rows=2), low_rank(experts=3), 0.55
    router = ScriptedRouter([1.0] * BLOCKS)
    router.low_rank = added
    run = Run(Plan(0.5), Method(router, Nothing()), [sigma])
    got = scene.evaluate(run, sigma)
    omega = torch.softmax(torch.lerp(added.mix[4], added.mix[5], 0.4), -1)
    entering = scene.embed(sigma)
    for (block, layer), down, up in zip(added.keys, added.down, added.up):
        weight = FAMILY.blocks(scene.model)[block].get_submodule(layer).weight
        weight.add_(torch.einsum("n,nor->or", omega[block], up) @ down[0])
    assert difference(got, scene.blocks(*entering)) < 1e-5


@pytest.mark.parametrize("gate, expected", [("softmax", [0.5, 0.5]), ("sigmoid", [0.5, 0.5]), ("none", [0.0, 0.0])])
def test_the_gate_of_the_experts_is_the_files(gate: str, expected: list[float]) -> None:
    added = TimestepLoRA({(0, "linear1"): (torch.ones(2, 1, 4), torch.ones(1, 8, 1))}, torch.zeros(2, 1, 2), gate)
    omega = added.weights(torch.tensor([0.3]))
    assert omega[0, 0].tolist() == expected
    low = added.at(omega[:, 0], 0, "linear1")
    assert low.down.shape == (1, 1, 4) and low.up.shape == (1, 8, 1), "the side with one factor is shared"
    assert float(low.down[0, 0, 0].detach()) == sum(expected)


def test_additions_stop_outside_the_window_and_cost_little_at_flux_width() -> None:
    from dydit_core import flops
    from dydit_core.parts import Geometry
    scene, router = Scene(), ScriptedRouter([0.5] * BLOCKS)
    router.low_rank = low_rank()
    run = Run(Plan(0.5, start_sigma=0.8), Method(router, Nothing()), [1.0, 0.5])
    entering = scene.embed(1.0)
    assert torch.equal(scene.evaluate(run, 1.0), scene.blocks(*entering)), "outside, the model is untouched"
    wide = Geometry(4096, 256, 3072)
    layers = {**{f"{stream}_{name}": 16 for stream in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")},
              "linear1": 16, "linear2": 16}
    for own, more in ((flops.flux_double, flops.flux_double_low_rank), (flops.flux_single, flops.flux_single_low_rank)):
        assert more(wide, layers).at(4096) / own(wide).at(4096) < 0.02


def test_every_gate_open_is_the_low_rank_additions_alone() -> None:
    scene, added = Scene(), low_rank()
    method = Method(wide_router(tokens=True, added=added).open, Nothing())
    run, (got,), (evaluation,) = scene.run(Plan(0.5), method, [0.5])
    assert evaluation.computed == 1.0 and run.ledger.achieved > 1.0
    router = ScriptedRouter([1.0] * BLOCKS)
    router.low_rank = added
    assert torch.equal(got, scene.run(Plan(0.5), Method(router, Nothing()), [0.5])[1][0])


def test_a_weight_that_is_cast_for_each_call_does_not_cost_others_their_cuts() -> None:
    layouts, lasting = Layouts(), torch.randn(8, 6)
    lines = ((0, 2), (4, 6)), ((0, 6),)
    kept_cut, _ = layouts.cut("lasting", lasting, None, *lines)
    for _ in range(3):
        weight = torch.randn(8, 6)  # the one before is gone by now
        cut, _ = layouts.cut("cast", weight, None, *lines)
        assert torch.equal(cut, weight[[0, 1, 4, 5]])
    assert layouts.cut("lasting", lasting, None, *lines)[0] is kept_cut and layouts.held == kept_cut.nbytes
