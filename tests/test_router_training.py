"""Training of the token router: gates, costs, gradients, and runs that resume exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dydit_core.models.flux import Flux, FluxConfig
from dydit_core.parts import BlockCost
from dydit_core.routers.token import TokenScores, fraction_above
from dydit_core.routers.width import new_width_scores
from dydit_core.train.calibrate import calibrate
from dydit_core.train.gates import Gates, Noise, TrainingPass, straight_through
from dydit_core.train.router import Recipe, RouterRun, load, new_router_run, routed, save, train_router, train_step
from dydit_core.train.team import Team
from dydit_core.train.trajectories import Trajectories, plan_runs, record

RECIPE = Recipe(steps=6, batch=16, budgets=(0.5, 0.7, 0.9))


@pytest.fixture(scope="module")
def model() -> Flux:
    """Random weights everywhere: a fresh FLUX would ignore its blocks, whose gates start at zero."""
    torch.manual_seed(0)
    model = Flux(FluxConfig(64, 1, 2, in_channels=2, context_in_dim=8, vec_in_dim=8, axes_dim=(8, 12, 12)))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def data(model: Flux) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(6, 3, 8, generator=generator), torch.randn(6, 8, generator=generator)
    plan = plan_runs(prompts, (torch.zeros(1, 3, 8), torch.zeros(1, 8)), torch.randn(6, 2, 8, 8, generator=generator), 4, generator)
    record(model, plan)
    return plan


def tokens() -> Gates:
    return Gates(TokenScores(3, 64, 4))


def fresh(model: Flux, data: Trajectories, recipe: Recipe = RECIPE) -> RouterRun:
    return new_router_run(model, data, recipe, rank=4)


def test_a_gate_is_hard_forward_and_soft_backward() -> None:
    x = torch.tensor([-2.0, -0.1, 0.1, 3.0], requires_grad=True)
    gate = straight_through(x)
    assert gate.tolist() == [0, 0, 1, 1]
    gate.sum().backward()
    soft = torch.sigmoid(x.detach())
    torch.testing.assert_close(x.grad, soft * (1 - soft))


def test_open_gates_are_the_dense_model_exactly(model: Flux, data: Trajectories) -> None:
    samples, _ = data.draw(3, torch.Generator().manual_seed(0))
    current = TrainingPass(tokens(), 3, samples.sigma, 1e9)
    gated = routed(model, current, samples)
    dense = model(samples.x, samples.sigma, samples.context, samples.pooled)
    torch.testing.assert_close(gated, dense, rtol=0, atol=1e-5)
    assert "forward" not in model.single_blocks[0].__dict__
    again = routed(model, TrainingPass(tokens(), 3, samples.sigma, 1e9, stale=[v + 1 for v in current.values]), samples)
    assert torch.equal(again, gated)


def test_closed_gates_use_what_stands_in(model: Flux, data: Trajectories) -> None:
    samples, before = data.draw(3, torch.Generator().manual_seed(0))
    opened, closed = (TrainingPass(tokens(), 3, samples.sigma, shift) for shift in (1e9, -1e9))
    dense, skipped = (routed(model, current, samples) for current in (opened, closed))
    assert (skipped - dense).abs().max() > 0.1
    reused = routed(model, TrainingPass(tokens(), 3, samples.sigma, -1e9, stale=opened.values), samples)
    torch.testing.assert_close(reused, dense, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shift, expected", [(1e9, 9 * 0.05**2), (-1e9, 0.0)])
def test_a_gate_that_stays_open_is_told(shift: float, expected: float, model: Flux, data: Trajectories) -> None:
    """Three blocks, each with tokens, heads and groups; of what is shut the highest head and group stay on."""
    samples, _ = data.draw(3, torch.Generator().manual_seed(0))
    current = TrainingPass(Gates(TokenScores(3, 64, 4), new_width_scores(3, 4, 8)), 3, samples.sigma, shift)
    routed(model, current, samples)
    assert current.unmoved(0.95).item() == pytest.approx(expected, abs=1e-6)


def test_cost_is_the_fraction_of_dense_flops() -> None:
    current = TrainingPass(Gates(), 0, torch.ones(1))
    current.gates = [torch.tensor([[1.0, 1.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0, 0.0]])]
    cost = current.cost([BlockCost(10, 5), BlockCost(2, 12)])
    assert cost.item() == pytest.approx((10 + 2 * 5 + 2 + 12) / (10 + 4 * 5 + 2 + 4 * 12))


def test_gradients_reach_the_router_and_not_the_base(model: Flux, data: Trajectories) -> None:
    run = fresh(model, data)
    samples, _ = data.draw(4, torch.Generator().manual_seed(0))
    noise = Noise(torch.randn(3, 4, 16))
    velocity = routed(model, TrainingPass(run.gates, 3, samples.sigma, run.shifts[0], noise), samples)
    (velocity - samples.velocity).square().mean().backward()
    for name in ("weight", "text", "up", "slope", "bias"):
        assert run.gates.tokens.get_parameter(name).grad.abs().amax(tuple(range(1, run.gates.tokens.get_parameter(name).ndim))).min() > 0
    assert all(param.grad is None for param in model.parameters())


def test_an_untrained_router_starts_near_its_budgets(model: Flux, data: Trajectories) -> None:
    run = fresh(model, data, replace(RECIPE, batch=24))
    train_step(run, model, data, replace(RECIPE, batch=24))
    torch.testing.assert_close(run.gauge[:, 0], torch.tensor(RECIPE.budgets), rtol=0, atol=0.08)


def test_the_flops_loss_meets_its_budget(model: Flux, data: Trajectories) -> None:
    """Wrong shifts come right when nothing but the budget counts."""
    recipe = Recipe(steps=100, batch=8, rate=0.02, budgets=(0.6,), flops_weight=1e4)
    run = fresh(model, data, recipe)
    run.shifts.data.fill_(3.0)
    costs = []
    for _ in range(recipe.steps):
        train_step(run, model, data, recipe)
        costs.append(float(run.gauge[0, 0]))
    assert costs[0] > 0.85 and costs[-1] == pytest.approx(0.6, abs=0.03)


def test_a_run_resumes_exactly(model: Flux, data: Trajectories, tmp_path: Path) -> None:
    whole = fresh(model, data)
    train_router(whole, model, data, RECIPE, tmp_path / "whole.pt", log=lambda line: None)
    part = fresh(model, data)
    for _ in range(3):
        train_step(part, model, data, RECIPE)
    save(part, tmp_path / "part.pt")
    resumed = fresh(model, data)
    load(resumed, tmp_path / "part.pt")
    train_router(resumed, model, data, RECIPE, tmp_path / "part.pt", log=lambda line: None)
    assert resumed.step == whole.step == 6 and torch.equal(resumed.gauge, whole.gauge)
    for key, value in whole.gates.state_dict().items():
        assert torch.equal(resumed.gates.state_dict()[key], value)


def test_any_few_samples_cover_the_schedule_and_know_what_came_before(data: Trajectories) -> None:
    now, before = data.draw(24, torch.Generator().manual_seed(0))
    first = now.sigma == 1
    assert first.any() and torch.equal(before.x[first], now.x[first]) and (before.sigma > now.sigma)[~first].all()
    for start in range(17):
        few = now.rows(slice(start, start + 8)).sigma.sort().values
        assert few[0] < 0.45 and few[-1] == 1 and few.diff().max() < 0.5


def test_a_run_is_steered_by_its_guidance(model: Flux, data: Trajectories) -> None:
    """The kept velocities lead from each kept point to the next."""
    assert data.cfg.min() >= 1 and data.cfg.max() <= 3
    cond, uncond = data.velocity.float().unbind(2)
    guided = uncond + data.cfg[:, None, None, None, None] * (cond - uncond)
    step = data.sigmas.diff(dim=1)[:, :, None, None, None]
    torch.testing.assert_close(data.x[:, 1:].float(), data.x[:, :-1].float() + step * guided[:, :-1], rtol=0, atol=0.02)


def test_a_team_records_what_one_process_records(model: Flux, data: Trajectories) -> None:
    shares = Trajectories(data.x.clone(), torch.zeros_like(data.velocity), data.sigmas, data.cfg, data.context, data.pooled)
    for rank in range(2):
        record(model, shares, batch=2, team=Team(rank, 2))
    torch.testing.assert_close(shares.velocity, data.velocity, rtol=0, atol=0.02)


def test_calibration_knows_what_a_threshold_keeps(model: Flux, data: Trajectories) -> None:
    torch.manual_seed(2)
    scores = TokenScores(3, 64, 4, bias=0.3)
    with torch.no_grad():
        scores.up.normal_(0, 0.1)
        scores.weight.normal_(0, 0.1)
    table = calibrate(model, Gates(scores), data, shift=0.2, samples=256, bins=2)
    assert (table.quantiles.diff(dim=-1) >= 0).all()
    samples, _ = data.draw(256, torch.Generator().manual_seed(9))
    current = TrainingPass(Gates(scores), 3, samples.sigma, 0.2)
    with torch.no_grad():
        routed(model, current, samples)
    kept = torch.stack(current.gates).mean((1, 2))
    quantiles = table.at(samples.sigma)
    expected = fraction_above(quantiles, torch.full(quantiles.shape[:2], -0.2, dtype=torch.float64))
    torch.testing.assert_close(expected.mean(0).float(), kept, rtol=0, atol=0.05)
