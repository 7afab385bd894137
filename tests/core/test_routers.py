"""Who decides: each router's choice against its definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import BLOCKS, CONFIG, Scene, gaussian_router, schedule
from torch.nn import functional as F

from dydit_core.budget import Plan
from dydit_core.methods import ALTERNATE, AUTO, CHANGED, CHECKPOINT, LEARNED, METHODS, resolve
from dydit_core.kept import Kept
from dydit_core.parts import Allotment, BlockCost, Extent, Gate, Geometry, Outlook, Setting
from dydit_core.routers.alternate import AlternateRouter
from dydit_core.routers.change import ChangeRouter, ChangeState
from dydit_core.routers.learned import LearnedRouter
from dydit_core.routers.official import OfficialRouter, ThresholdRouter
from dydit_core.routers.random import RandomRouter
from dydit_core.routers.token import CapacityTable, TokenScores, fraction_above
from dydit_core.runtime import Method
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing


def gate(normed: torch.Tensor, block: int = 0) -> Gate:
    text = torch.zeros(normed.shape[0], 3, normed.shape[2])
    return looked_at(block, normed, text, torch.zeros(normed.shape[0], normed.shape[2]))


def looked_at(block: int, image: torch.Tensor, text: torch.Tensor | None, condition: torch.Tensor) -> Gate:
    return Gate(block, 0.5, image, condition, lambda: image, text, lambda: text)


@pytest.mark.parametrize("width", [32, 64, 200])
def test_the_changed_token_ranks_first(width: int) -> None:
    torch.manual_seed(0)
    state, first = ChangeState(ChangeRouter(patience=8)), torch.randn(2, 10, width)
    state.computed(gate(first), None)
    later = first.clone()
    later[0, 3] += 1.0
    later[1, 7] += 1.0
    assert state.scores(gate(later)).argmax(1).tolist() == [3, 7]
    assert int((state.scores(gate(later)) > 0).sum()) == 2


def test_change_is_since_a_token_was_last_computed() -> None:
    state, x = ChangeState(ChangeRouter(patience=8)), torch.zeros(1, 4, 8)
    state.computed(gate(x), None)
    for step in range(1, 4):
        x = x + torch.tensor([0.0, 1.0, 2.0, 0.0]).view(1, 4, 1)
        state.computed(gate(x), Kept(torch.tensor([[2]]), 1, 4))
    scores = state.scores(gate(x))[0]
    assert scores[2] == 0 and scores[1] == 8 * 3.0**2 and scores[0] == 0


def test_no_token_starves() -> None:
    """Token 0 changes most for ever; each of the others is computed once in `patience` + 1 evaluations all the same."""
    state, x, seen = ChangeState(ChangeRouter(patience=3)), torch.zeros(1, 4, 8), []
    state.computed(gate(x), None)
    for _ in range(12):
        x = x.clone()
        x[0, 0] += 1000.0
        best = state.scores(gate(x)).topk(2, dim=1).indices
        state.computed(gate(x), Kept(best.sort(1).values, *x.shape[:2]))
        seen.append(set(best[0].tolist()))
    for token in range(4):
        waits = [index for index, chosen in enumerate(seen) if token in chosen]
        assert max(b - a for a, b in zip([-1, *waits], [*waits, 12])) <= 6, (token, seen)


def test_blocks_do_not_share_what_changed() -> None:
    state, x = ChangeState(ChangeRouter(patience=8)), torch.zeros(1, 4, 8)
    state.computed(gate(x, 0), None)
    state.computed(gate(x + 1, 1), None)
    assert state.scores(gate(x, 0)).sum() == 0 and state.scores(gate(x, 1)).sum() == 4 * 8


@pytest.mark.parametrize("min_keep", [0.0, 0.1])
def test_alternate_steps_at_half_alternate_exactly(min_keep: float) -> None:
    """Over 20 steps at the budget midway between none and all: every second evaluation, the first one full."""
    costs = [BlockCost(30.0, 0.7), BlockCost(30.0, 0.7)]
    router, kept, spent = AlternateRouter(), [], 0.0
    sigmas = torch.tensor(schedule(20), dtype=torch.float64)
    for done in range(20):
        look = Outlook(sigmas[done:], (0.65 * 20 - spent) / (20 - done), done, spent, min_keep, costs, 100)
        keep = router.start(Setting(())).keep(look)
        kept.append(float(keep.tokens[0]))
        spent += float(look.cost(keep))
    assert kept == pytest.approx([1.0, 0.0] * 10, abs=1e-6)
    assert spent / 20 == pytest.approx(0.65)


def test_alternate_run_computes_all_or_nothing() -> None:
    scene = Scene()
    _, _, trace = scene.run(Plan(0.6), Method(AlternateRouter(), Reuse()), schedule(20))
    assert all(evaluation.computed in (0.0, 1.0) for evaluation in trace[:-1])
    full = [index for index, evaluation in enumerate(trace[:-1]) if evaluation.computed == 1.0]
    assert full[0] == 0
    gaps = {b - a for a, b in zip(full, full[1:])}
    assert max(gaps) - min(gaps) <= 1


def test_the_last_alternate_step_spreads_over_the_picture() -> None:
    scores = AlternateRouter().start(Setting(())).scores(gate(torch.zeros(1, 64, 8)))
    chosen = scores[0].topk(16).indices.sort().values
    assert int(chosen.diff().max()) <= 8 and int(chosen.diff().min()) >= 2


def test_token_logits_are_the_formula() -> None:
    torch.manual_seed(0)
    blocks, width, rank = 3, 16, 4
    scores = TokenScores(blocks, width, rank).requires_grad_(False)
    for parameter in scores.parameters():
        parameter.normal_()
    x, text, condition = torch.randn(2, 7, width), torch.randn(2, 5, width), torch.randn(2, width)
    for block in range(blocks):
        logits = scores(looked_at(block, x, text, condition))
        for row in range(2):
            mixed = torch.tanh(scores.down[block] @ F.silu(condition[row]))
            for token in range(7):
                expected = x[row, token] @ (scores.weight[block] + scores.up[block] @ mixed)
                expected = expected + text[row].mean(0) @ scores.text[block] + scores.slope[block] @ mixed + scores.bias[block]
                assert float(logits[row, token]) == pytest.approx(float(expected), rel=1e-4, abs=1e-4)


def test_a_tokens_change_counts_where_it_is_learned() -> None:
    torch.manual_seed(0)
    plain, stale = TokenScores(2, 96, 4), TokenScores(2, 96, 4, stale=True)
    stale.load_state_dict({**plain.state_dict(), "stale": torch.tensor([0.5, -2.0])})
    inputs, change = (torch.randn(2, 7, 96), torch.randn(2, 5, 96), torch.randn(2, 96)), torch.rand(2, 7)
    for block, slope in ((0, 0.5), (1, -2.0)):
        seen = looked_at(block, *inputs)
        expected = plain(seen) + slope * (change + 0.01).log()
        torch.testing.assert_close(stale(seen, change), expected)
    assert stale.flops(7) - plain.flops(7) == 2 * 7 * 48
    assert stale.copy_to(torch.device("cpu")).stale.tolist() == [0.5, -2.0]


def test_learned_gates_hold_what_a_token_was_when_computed() -> None:
    state = LearnedRouter(scores=TokenScores(BLOCKS, 96, 4, stale=True).requires_grad_(False)).start(Setting([1.0]))
    x = torch.zeros(2, 4, 96)
    never = state.scores(gate(x + 1, 0))
    state.computed(gate(x, 0), None)
    state.computed(gate(x + 2, 0), Kept(torch.tensor([[1, 3], [1, 3]]), 2, 4))
    change = state.sketches.change(gate(x + 1, 0))
    assert change[0].tolist() == [48, 48, 48, 48]
    assert state.sketches.change(gate(x, 0))[1].tolist() == [0, 4 * 48, 0, 4 * 48]
    assert state.rows(slice(1, 2)).sketches.change(gate(x[:1], 0)).tolist() == [[0, 192, 0, 192]]
    held = sum(part.nbytes for part in state.sketches.held.values())
    assert held * BLOCKS == 2 * state.config.row_bytes(Extent(Geometry(4, 5, 96), BLOCKS, 4, 1, element_size=4))
    state.reset()
    assert torch.equal(state.scores(gate(x + 1, 0)), never)


def above(table: CapacityTable, sigmas: list[float], shift: float) -> torch.Tensor:
    """Fraction [S, blocks] of tokens that a shift keeps."""
    quantiles = table.at(torch.tensor(sigmas))
    return fraction_above(quantiles, torch.full(quantiles.shape[:2], -shift, dtype=torch.float64))


@pytest.mark.parametrize("shift", [-2.0, -0.5, 0.0, 0.7, 3.0])
def test_the_table_keeps_what_the_logits_keep(shift: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 20_000) * torch.tensor([1.0, 2.0]).view(2, 1, 1) + torch.tensor([-1.0, 0.0, 1.0]).view(1, 3, 1)
    table = CapacityTable(torch.quantile(logits, torch.linspace(0, 1, 65), dim=-1).permute(1, 2, 0), torch.tensor([0.3, 0.6, 1.0]))
    kept = above(table, [0.2, 0.5, 0.9, 1.2], shift)
    empirical = (logits + shift > 0).double().mean(-1).T
    assert kept.shape == (4, 2)
    assert torch.allclose(kept[:3], empirical, atol=0.02)
    assert torch.equal(kept[3], kept[2]), "a sigma above the last edge belongs to the last bin"


def test_the_tables_ends_keep_nothing_and_everything() -> None:
    table = gaussian_router().table
    low, high = table.span
    assert above(table, [0.5], low).max() == 0.0 and above(table, [0.5], high).min() == 1.0


def test_more_budget_keeps_more_in_every_block() -> None:
    scene, router = Scene(), gaussian_router()
    looks = [Outlook(torch.tensor(schedule(4)), share, 0, 0.0, 0.1, scene.costs, 64) for share in (0.5, 0.6, 0.8, 0.95)]
    kept = torch.stack([router.start(Setting(())).keep(look).tokens for look in looks])
    assert (kept.diff(dim=0) >= 0).all() and (kept.diff(dim=0) > 0).any()
    assert (kept[1].diff() > 0).any(), "blocks that want more get more"
    for look, row in zip(looks, kept):
        assert float(look.cost(Allotment(row))) == pytest.approx(look.share, abs=1e-3)


def test_the_adapter_is_not_moved_by_a_run() -> None:
    router = gaussian_router()
    state = router.start(Setting(()))
    x = torch.zeros(1, 4, CONFIG.hidden_size, device="meta")
    assert state.scores(Gate(0, 1.0, x, x[:, 0], lambda: x, x, lambda: x)).device.type == "meta"
    assert router.scores.weight.device.type == "cpu" and state._placed is not None


def test_random_is_seeded() -> None:
    x = gate(torch.zeros(1, 9, 8))
    one, two = RandomRouter(seed=4).start(Setting(())), RandomRouter(seed=4).start(Setting(()))
    first = one.scores(x)
    assert torch.equal(first, two.scores(x)) and not torch.equal(first, one.scores(x))


def test_router_flops_are_counted() -> None:
    """The router's own products, as torch counts them, are what it says they cost."""
    from toy import count
    router, geometry = gaussian_router(), Geometry(64, 5, CONFIG.hidden_size)
    seen = looked_at(0, torch.randn(1, 64, 32), torch.randn(1, 5, 32), torch.randn(1, 32))
    assert count(lambda: router.scores(seen)) == pytest.approx(router.flops(geometry), rel=0.05)


def test_reuse_holds_what_it_says() -> None:
    state = Reuse().start()
    joint = torch.randn(2, 5 + 64, 32)
    for block in range(BLOCKS):
        state.update(block, torch.zeros(2, 64, 32), torch.ones(2, 1, 32), None, joint[:, 5:])
    held = sum(x.untyped_storage().nbytes() for x in state.last.values())
    extent = Extent(Geometry(64, 5, 32), BLOCKS, 4, 1, element_size=4)
    assert held == 2 * Reuse().row_bytes(extent)
    assert Nothing().row_bytes(extent) == 0


@pytest.mark.parametrize("width", [32, 96])
def test_changed_tokens_hold_what_they_say(width: int) -> None:
    state = ChangeRouter().start(Setting([1.0]))
    for block in range(BLOCKS):
        state.computed(gate(torch.randn(2, 64, width), block), None)
    held = sum(x.untyped_storage().nbytes() for part in (state.sketches.held, state.ages) for x in part.values())
    assert held == 2 * ChangeRouter().row_bytes(Extent(Geometry(64, 5, width), BLOCKS, 4, 1, element_size=4))


def test_methods_resolve() -> None:
    router = gaussian_router()
    assert resolve(AUTO, AUTO, None)[0] == resolve(AUTO, AUTO, router)[0] == CHANGED
    assert resolve(AUTO, "nothing", router)[::2] == (LEARNED, Method(router, Nothing()))
    reusing = replace(router, trained_for="reuse")
    assert resolve(AUTO, AUTO, reusing) == resolve(LEARNED, "reuse", reusing) == (LEARNED, "reuse", Method(reusing, Reuse()))
    assert resolve(ALTERNATE, AUTO, None)[2].router == AlternateRouter()
    assert set(METHODS) == {LEARNED, CHECKPOINT, CHANGED, ALTERNATE}
    with pytest.raises(ValueError, match="needs a trained router"):
        resolve(LEARNED, AUTO, None)
    with pytest.raises(ValueError, match="needs gates that were trained"):
        resolve(CHANGED, "nothing", None)
    with pytest.raises(ValueError, match="needs the routers of a released DyDiT file"):
        resolve(CHECKPOINT, AUTO, router)


def test_methods_of_a_released_router() -> None:
    router = OfficialRouter(lambda block: None, BLOCKS)
    assert resolve(AUTO, AUTO, router) == (LEARNED, "nothing", Method(router, Nothing()))
    assert resolve(LEARNED, "reuse", router) == (LEARNED, "reuse", Method(router, Reuse()))
    assert isinstance(resolve(CHECKPOINT, AUTO, router)[2].router, ThresholdRouter)
    with pytest.raises(ValueError, match='set substitute to "nothing"'):
        resolve(CHECKPOINT, "reuse", router)


def test_a_router_for_reuse_spends_early() -> None:
    """Its kept fractions fall faster with sigma, at the same mean cost."""
    scene, router = Scene(), gaussian_router()
    look = Outlook(torch.tensor([1.0, 0.7, 0.4, 0.1], dtype=torch.float64), 0.7, 0, 0.0, 0.0, scene.costs, 64)
    plain, early = (one.start(Setting(())).keep(look) for one in (router, router.for_reuse()))
    assert (early.tokens > plain.tokens).all()
    late = replace(look, sigmas=look.sigmas[3:])
    assert float(look.cost(plain)) == pytest.approx(0.7, abs=1e-3) and float(late.cost(early)) > 0.7
