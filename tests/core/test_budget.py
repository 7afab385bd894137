"""What was asked is what is spent: FLOPs counted around real runs, for every router, sampler and length of schedule."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from toy import BLOCKS, CONFIG, Scene, counted_run, gaussian_router, heun, schedule

from dydit_core.budget import Ledger, Plan, capacity, forecast, solve_shift
from dydit_core.parts import Allotment, BlockCost, Geometry, Outlook, Router, Setting
from dydit_core.routers.alternate import AlternateRouter
from dydit_core.routers.change import ChangeRouter
from dydit_core.routers.random import RandomRouter
from dydit_core.runtime import Branches, Method
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing

METHODS = {
    "change": Method(ChangeRouter(), Reuse()),
    "alternate": Method(AlternateRouter(), Reuse()),
    "random": Method(RandomRouter(), Nothing()),
    "token": Method(gaussian_router(), Nothing()),
    "token reuse": Method(gaussian_router(), Reuse()),
}
PAIR = Branches(("cfg",), slice(0, 1), slice(1, 2))


def overhead(method: Method, scene: Scene) -> float:
    dense = sum(cost.at(scene.geometry.image_tokens) for cost in scene.costs)
    return BLOCKS * method.router.flops(scene.geometry) / dense


def reach(plan: Plan, method: Method, sigmas: list[float], scene: Scene) -> float:
    """What `forecast` promises."""
    return forecast(plan, method.router, sigmas, scene.costs, scene.geometry.image_tokens, method.needs_history,
                    overhead(method, scene))


@cache
def lone_scene() -> Scene:
    return Scene()


def check(scene: Scene, plan: Plan, method: Method, sigmas: list[float], evaluations: list[float] | None = None) -> float:
    """Spends what was asked, or the floor where that is higher; books what it spends; says both before."""
    run, counted = counted_run(scene, plan, method, sigmas, evaluations)
    floor = reach(replace(plan, budget=0.0), method, evaluations or sigmas, scene)
    assert run.ledger.achieved == pytest.approx(counted, rel=0.005)
    if plan.budget >= floor * 1.02:
        assert counted == pytest.approx(plan.budget, rel=0.02)
    else:
        assert counted == pytest.approx(floor, rel=0.02)
    if evaluations is None:
        assert reach(plan, method, sigmas, scene) == pytest.approx(counted, rel=0.01)
    return counted


@pytest.mark.parametrize("steps, budget", [(4, 0.9), (4, 0.75), (4, 0.5), (4, 0.0), (8, 0.9), (8, 0.5), (20, 0.75)])
@pytest.mark.parametrize("name", METHODS)
def test_euler(name: str, steps: int, budget: float) -> None:
    check(lone_scene(), Plan(budget), METHODS[name], schedule(steps))


@pytest.mark.parametrize("budget", [0.75, 0.5])
@pytest.mark.parametrize("name", METHODS)
def test_heun(name: str, budget: float) -> None:
    check(lone_scene(), Plan(budget), METHODS[name], schedule(6), heun(schedule(6)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget, steps", [(0.6, 12), (0.0, 8)])
def test_window(name: str, steps: int, budget: float) -> None:
    counted = check(lone_scene(), Plan(budget, start_sigma=0.9, end_sigma=0.1), METHODS[name], schedule(steps))
    assert counted < 0.8


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("share", [1.0, 2.0])
def test_cond_and_uncond(name: str, share: float) -> None:
    check(Scene(rows=2, branches=PAIR), Plan(0.6, branch_share=share), METHODS[name], schedule(8))


@pytest.mark.parametrize("name", ["change", "token"])
def test_tiles(name: str) -> None:
    """1,024 image tokens are kept in steps of 64, and the mean still meets the budget."""
    check(Scene(side=32), Plan(0.6), METHODS[name], schedule(6))


def test_an_early_end_keeps_the_mean() -> None:
    """A run stopped half-way has spent no more than asked, however much of its schedule was left."""
    run, counted = counted_run(lone_scene(), Plan(0.75), METHODS["token"], schedule(20), schedule(20)[:10])
    assert counted == pytest.approx(0.75, rel=0.05)


@pytest.mark.parametrize("tokens", [1024, 4096, 4097])
@pytest.mark.parametrize("keep", [0.0, 0.01, 0.1, 0.33, 0.5, 0.999, 1.0])
def test_large_capacities_lie_on_tile_edges(tokens: int, keep: float) -> None:
    kept = capacity(keep, tokens, min_keep=0.1)
    assert kept % 64 == 0 or kept == tokens
    assert kept >= 0.1 * tokens or keep == 0.0
    assert abs(kept - max(keep, 0.1 if keep else 0.0) * tokens) <= 64


@pytest.mark.parametrize("tokens, keep, least, expected", [(100, 0.336, 0.1, 34), (100, 0.01, 0.1, 10), (100, 0.0, 0.1, 0), (7, 1.0, 0.1, 7)])
def test_small_capacities_are_exact(tokens: int, keep: float, least: float, expected: int) -> None:
    assert capacity(keep, tokens, least) == expected


def outlook(share: float, steps: int = 5, done: int = 0, spent: float = 0.0) -> Outlook:
    costs = [BlockCost(30.0, 0.7), BlockCost(20.0, 0.8)]
    return Outlook(torch.tensor(schedule(steps), dtype=torch.float64), share, done, spent, 0.1, costs, 100)


def keep(router: Router, look: Outlook) -> torch.Tensor:
    """Kept fractions of tokens [blocks] by a fresh state."""
    return router.start(Setting(())).keep(look).tokens


def test_cost_is_one_where_all_is_kept() -> None:
    assert float(outlook(0.5).cost(Allotment(torch.ones(2)))) == pytest.approx(1.0)
    assert float(outlook(0.5).cost(Allotment(torch.tensor([1.0, 0.0])))) == pytest.approx(120 / 200)


@pytest.mark.parametrize("router", [ChangeRouter(), ChangeRouter(early=0.0), RandomRouter()])
def test_more_budget_never_keeps_less(router: ChangeRouter | RandomRouter) -> None:
    kept = torch.stack([keep(router, outlook(share)) for share in torch.linspace(0.2, 1.1, 19).tolist()])
    assert (kept.diff(dim=0) >= 0).all()
    assert kept[0].tolist() == [0.1, 0.1] and kept[-1].min() > 0.999


def test_the_shift_meets_the_share() -> None:
    def solve(look: Outlook) -> tuple[Allotment, float]:
        return solve_shift(lambda count, shift: profile(look.sigmas[:count], shift), look, -9, 9)

    def profile(sigmas: torch.Tensor, shift: float) -> Allotment:
        return Allotment(torch.sigmoid(torch.stack((4 * sigmas - 2, 2 * sigmas - 1), dim=1) + shift))

    look = outlook(0.6)
    kept = [solve(replace(look, sigmas=look.sigmas[i:i + 1]))[0] for i in range(5)]
    assert all(float(look.cost(one)) == pytest.approx(0.6, abs=1e-6) for one in kept)
    allotment, shift = solve(look)
    assert torch.allclose(allotment.tokens, profile(look.sigmas, shift).tokens[0].clamp(min=0.1))
    assert float(look.cost(profile(look.sigmas, shift)).mean()) == pytest.approx(0.6, abs=1e-3)


def test_capacities_depend_on_the_outlook_alone() -> None:
    """`keep` is the same for a router that has seen data and one that has not: nothing is read back from the device."""
    scene = lone_scene()
    for method in METHODS.values():
        look = Ledger(Plan(0.6), schedule(8)).outlook(1.0, scene.costs, 64)
        fresh = keep(method.router, look)
        scene.run(Plan(0.6), method, schedule(8))
        assert torch.equal(keep(method.router, look), fresh) and fresh.device.type == "cpu"


def test_heun_is_learnt_from_its_second_step() -> None:
    ledger = Ledger(Plan(0.5), [1.0, 0.75, 0.5, 0.25])
    counts = []
    for sigma in heun([1.0, 0.75, 0.5, 0.25]):
        ledger.arrive(sigma)
        counts.append(len(ledger.ahead(sigma)))
    assert counts == [4, 3, 5, 4, 3, 2, 1]


def patterns(sigmas: list[float]) -> dict[str, list[float]]:
    """Where samplers evaluate: midpoint methods (dpm_2, dpmpp_sde), third-order ones, Heun++ (which goes back)."""
    steps = list(zip(sigmas, sigmas[1:]))
    return {
        "midpoint": [at for a, b in steps for at in (a, (a * b) ** 0.5)] + sigmas[-1:],
        "three": [at for a, b in steps for at in (a, (2 * a + b) / 3, (a + 2 * b) / 3)] + sigmas[-1:],
        "heun++": [at for start in range(len(sigmas)) for at in sigmas[start:start + 3]],
    }


@pytest.mark.parametrize("pattern", patterns(schedule(4)))
@pytest.mark.parametrize("steps", [4, 20])
@pytest.mark.parametrize("name", METHODS)
def test_samplers_that_evaluate_between_steps(name: str, steps: int, pattern: str) -> None:
    """Booked, not counted: the ledger and the routers alone, on the CPU."""
    method, scene, plan = METHODS[name], lone_scene(), Plan(0.6)
    ledger = Ledger(plan, schedule(steps))
    for sigma in patterns(schedule(steps))[pattern]:
        ledger.arrive(sigma)
        if method.needs_history and not ledger.spent:
            ledger.book(1.0)
            continue
        look = ledger.outlook(sigma, scene.costs, 4096)
        kept = [capacity(float(part), 4096, 0.1) / 4096 for part in keep(method.router, look)]
        ledger.book(float(look.cost(Allotment(torch.tensor(kept)))))
    assert ledger.achieved == pytest.approx(0.6, rel=0.02)


def test_what_is_ahead_lies_where_the_sampler_evaluates() -> None:
    ledger = Ledger(Plan(0.5, end_sigma=0.1), [0.7, 0.4, 0.1])
    for sigma in (0.7, 0.55, 0.4):
        ledger.arrive(sigma)
    assert ledger.ahead(0.4) == pytest.approx([0.4, 0.25, 0.1])
    assert len(ledger.outlook(0.4, [BlockCost(1.0, 1.0)], 10).sigmas) == 3, "the window's own edge is inside"


def test_an_sde_sampler_is_learnt_from_its_second_interval() -> None:
    """It begins a little below the first sigma, lies elsewhere between two steps each time, and ends without a midpoint."""
    ledger, ahead = Ledger(Plan(0.5), [1.0, 0.8, 0.6, 0.4, 0.2]), []
    for sigma in (0.9999, 0.99, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2):
        ledger.arrive(sigma)
        ahead.append(ledger.ahead(sigma))
    assert [len(steps) for steps in ahead] == [5, 5, 7, 6, 5, 4, 3, 2, 1]
    assert ahead[3] == pytest.approx([0.7, 0.6, 0.59, 0.4, 0.39, 0.2])  # as it was in the first interval
    assert ahead[5] == pytest.approx([0.5, 0.4, 0.3, 0.2])  # as it was in the second


def test_denoise_from_the_middle_counts_its_own_steps() -> None:
    ledger = Ledger(Plan(0.5), schedule(10)[5:])
    ledger.arrive(0.5)
    assert len(ledger.ahead(0.5)) == 5


@pytest.mark.parametrize("wrong", [dict(budget=1.5), dict(budget=0.5, min_keep=-1.0), dict(budget=0.5, branch_share=0.0)])
def test_impossible_plans_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be between"):
        Plan(**wrong)


def test_the_arithmetic_of_the_design() -> None:
    """FLUX.1-dev at 1024² with 256 text tokens: the kept fractions and the floor that DESIGN.md prints."""
    from toy import BACKEND, FAMILY, tiny_flux
    geometry = Geometry(4096, 256, 3072)
    model = tiny_flux()
    double, *_, single = FAMILY.costs(model, geometry, BACKEND)
    look = Outlook(torch.tensor([1.0]), 0.5, 0, 0.0, 0.0, [double] * 19 + [single] * 38, 4096)
    for share, kept in ((0.9, 0.86), (0.75, 0.65), (0.5, 0.30), (0.35, 0.09)):
        assert float(keep(ChangeRouter(early=0.0), replace(look, share=share))[0]) == pytest.approx(kept, abs=0.01)
    assert float(look.cost(Allotment(torch.zeros(57)))) == pytest.approx(0.29, abs=0.01)


def test_a_layer_that_cannot_be_sliced_costs_more() -> None:
    from dydit_core.flops import flux_single
    geometry = Geometry(64, 5, CONFIG.hidden_size)
    whole, sliced = flux_single(geometry, frozenset({"linear1"})), flux_single(geometry)
    assert whole.at(64) == pytest.approx(sliced.at(64)) and whole.at(0) > sliced.at(0)
