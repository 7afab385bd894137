"""Training of the token router: gates, costs, gradients, and runs that resume exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_training import RECIPE, data, fresh, model, teacher  # fixtures

from dydit_core.budget import Plan
from dydit_core.kept import Kept
from dydit_core.memory import Rowless
from dydit_core.parts import Allotment, BlockCost, Gate, Geometry, Outlook, Router, Setting
from dydit_core.routers.sketch import Sketches
from dydit_core.routers.token import TokenScores, fraction_above
from dydit_core.routers.width import new_width_scores
from dydit_core.runtime import Branches, Method, Run, running
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing
from dydit_core.train.calibrate import calibrate
from dydit_core.train.gates import Gates, Noise, Past, TrainingPass, straight_through
from dydit_core.train.rollout import roll_out
from dydit_core.train.router import Diverged, Recipe, load, save, train_step
from dydit_core.train.teacher import Teacher
from dydit_core.train.team import Team
from dydit_core.train.trajectories import Trajectories, Window, plan_runs, record


def window(data: list[Trajectories], rows: int = 3, length: int = 1) -> Window:
    return data[0].draw(rows, length, torch.Generator().manual_seed(0))


def single(teacher: Teacher, gates: Gates, window: Window, shift: float, **past: object) -> tuple[TrainingPass, Tensor]:
    """One evaluation, and its velocity."""
    current = TrainingPass(gates, 3, window.sigmas[:, 0], shift, **past)
    return current, teacher.gated(current, window.x[:, 0], window.sigmas[:, 0], *window.conditioning)


def tokens() -> Gates:
    return Gates(TokenScores(3, 64, 4))


def test_a_gate_is_hard_forward_and_soft_backward() -> None:
    x = torch.tensor([-2.0, -0.1, 0.1, 3.0], requires_grad=True)
    gate = straight_through(x)
    assert gate.tolist() == [0, 0, 1, 1]
    gate.sum().backward()
    soft = torch.sigmoid(x.detach())
    torch.testing.assert_close(x.grad, soft * (1 - soft))


def test_open_gates_are_the_dense_model(teacher: Teacher, data: list[Trajectories]) -> None:
    now = window(data)
    _, opened = single(teacher, tokens(), now, 1e9)
    dense = teacher.velocity(now.x[:, 0], now.sigmas[:, 0], *now.conditioning).float()
    torch.testing.assert_close(opened, dense, rtol=0, atol=1e-5)
    assert "forward" not in teacher.model.single_blocks[0].__dict__
    strange = Past({block: torch.full((3, 16, 64), 7.0) for block in range(3)})
    assert torch.equal(single(teacher, tokens(), now, 1e9, past=strange)[1], opened)


def test_closed_gates_use_what_stands_in(teacher: Teacher, data: list[Trajectories]) -> None:
    now = window(data)
    seen, dense = single(teacher, tokens(), now, 1e9, past=Past())
    skipped = single(teacher, tokens(), now, -1e9)[1]
    assert (skipped - dense).abs().max() > 0.1
    closed, reused = single(teacher, tokens(), now, -1e9, past=seen.history)
    torch.testing.assert_close(reused, dense, rtol=0, atol=1e-5)
    assert all(torch.equal(closed.history.values[block], seen.history.values[block]) for block in range(3)), "what was skipped stays as it was"


def test_a_window_is_what_the_runtime_does(teacher: Teacher, data: list[Trajectories]) -> None:
    """A whole run under fixed masks: the engine that gathers tokens and the training that multiplies give one picture."""
    kept = 10
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(5)).argsort(1)
    for reuse in (False, True):
        some = data[0].draw(2, 4, torch.Generator().manual_seed(0), start=int(reuse))
        plain, scripted, router = replace(some, pull=torch.ones(2)), Scripted(order, kept), ScriptedTokens(order, kept)
        drift = roll_out(teacher, Gates(scripted), plain, 0.0, [None] * 4, reuse=reuse).drift
        run = Run(Plan(0.5, min_keep=0.0), Method(router, Reuse() if reuse else Nothing()), [1.0])
        run.arrive(1.0)
        if reuse:  # the evaluation before the window
            with running(run, teacher.family, teacher.model, Geometry(16, 3, 64), Branches.cond_only(2), 2, (4, 4), teacher.backend):
                teacher.velocity(plain.before, plain.sigma_before, *plain.conditioning)
        x = plain.x[:, 0]
        for step in range(plain.length):
            geometry = Geometry(16, 3, 64)
            with running(run, teacher.family, teacher.model, geometry, Branches.cond_only(2), 2, (4, 4), teacher.backend):
                velocity = teacher.velocity(x, plain.sigmas[:, step], *plain.conditioning).float()
            # The dense velocities that the window holds lead from each of its points to the next only for a run of one branch.
            x = x + (plain.sigmas[:, step + 1] - plain.sigmas[:, step])[:, None, None, None] * (velocity - plain.velocity[:, step])
            x = x + plain.x[:, step + 1] - plain.x[:, step]
        torch.testing.assert_close(x - plain.x[:, -1], drift, rtol=0, atol=1e-4)
        assert drift.abs().max() > 0.1
        for ours, theirs in zip(scripted.changes, router.changes, strict=True) if reuse else ():
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


class Scripted(TokenScores):
    """Opens the first `kept` tokens of `order` [blocks, tokens]."""

    def __init__(self, order: Tensor, kept: int) -> None:
        super().__init__(len(order), 64, 4)
        self.changes: list[Tensor] = []
        self.open = torch.zeros(order.shape).scatter_(1, order[:, :kept], 1.0)

    def forward(self, gate: Gate, change: Tensor | None = None) -> Tensor:
        self.changes.append(change)
        return (self.open[gate.block] - 0.5).expand(len(gate.image), -1)


class ScriptedTokens(Rowless, Router):
    """The same tokens for the runtime: both a Router and its State."""

    def __init__(self, order: Tensor, kept: int) -> None:
        self.order, self.kept = order, kept
        self.sketches, self.changes = Sketches(), []

    def start(self, setting: Setting) -> ScriptedTokens:
        return self

    def keep(self, outlook: Outlook) -> Allotment:
        return Allotment(torch.full((3,), self.kept / 16, dtype=torch.float64))

    def scores(self, gate: Gate) -> Tensor:
        self.changes.append(self.sketches.change(gate))
        return -self.order[gate.block].argsort().float().expand(len(gate.image), -1)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        self.sketches.computed(gate, kept)


@pytest.mark.parametrize("shift, expected", [(1e9, 9 * 0.05**2), (-1e9, 0.0)])
def test_a_gate_that_stays_open_is_told(shift: float, expected: float, teacher: Teacher, data: list[Trajectories]) -> None:
    """Three blocks, each with tokens, heads and groups; of what is shut the highest head and group stay on."""
    current, _ = single(teacher, Gates(TokenScores(3, 64, 4), new_width_scores(3, 4, 8)), window(data), shift)
    assert (current.certain - 0.95).relu().square().sum().item() == pytest.approx(expected, abs=1e-6)


def test_cost_is_the_fraction_of_dense_flops() -> None:
    current = TrainingPass(Gates(), 0, torch.ones(1))
    current.gates = {0: torch.tensor([[1.0, 1.0, 0.0, 0.0]]), 1: torch.tensor([[1.0, 0.0, 0.0, 0.0]])}
    cost = current.cost([BlockCost(10, 5), BlockCost(2, 12)])
    assert cost.item() == pytest.approx((10 + 2 * 5 + 2 + 12) / (10 + 4 * 5 + 2 + 4 * 12))


@pytest.mark.parametrize("reuse", [False, True])
def test_gradients_reach_the_router_and_not_the_base(reuse: bool, teacher: Teacher, data: list[Trajectories]) -> None:
    run = fresh(teacher, data)
    noise = [Noise(torch.randn(3, 4, 16)) for _ in range(3)]
    roll_out(teacher, run.gates, window(data, 4, 3), run.shifts[0], noise, reuse=reuse).drift.square().mean().backward()
    for name in ("weight", "text", "up", "slope", "bias"):
        assert run.gates.tokens.get_parameter(name).grad.abs().amax(tuple(range(1, run.gates.tokens.get_parameter(name).ndim))).min() > 0
    assert all(param.grad is None for param in teacher.model.parameters())


def test_an_untrained_router_starts_near_its_budgets(teacher: Teacher, data: list[Trajectories]) -> None:
    run = fresh(teacher, data, replace(RECIPE, batch=24))
    train_step(run, teacher, data, replace(RECIPE, batch=24))
    torch.testing.assert_close(run.gauge[:, 0], torch.tensor(RECIPE.budgets), rtol=0, atol=0.08)


def test_the_flops_loss_meets_its_budget(teacher: Teacher, data: list[Trajectories]) -> None:
    """Wrong shifts come right when nothing but the budget counts."""
    recipe = Recipe(steps=100, batch=8, rate=0.02, budgets=(0.6,), flops_weight=1e4)
    run = fresh(teacher, data, recipe)
    run.shifts.data.fill_(3.0)
    costs = []
    for _ in range(recipe.steps):
        train_step(run, teacher, data, recipe)
        costs.append(float(run.gauge[0, 0]))
    assert costs[0] > 0.85 and costs[-1] == pytest.approx(0.6, abs=0.03)


def test_a_run_resumes_exactly(teacher: Teacher, data: list[Trajectories], tmp_path: Path) -> None:
    whole = fresh(teacher, data)
    losses = [train_step(whole, teacher, data, RECIPE) for _ in range(6)]
    part = fresh(teacher, data)
    for _ in range(3):
        train_step(part, teacher, data, RECIPE)
    save(part, tmp_path / "part.pt")
    resumed = fresh(teacher, data)
    load(resumed, tmp_path / "part.pt")
    for _ in range(3):
        train_step(resumed, teacher, data, RECIPE)
    assert resumed.losses == losses and torch.equal(resumed.gauge, whole.gauge)
    for key, value in whole.gates.state_dict().items():
        assert torch.equal(resumed.gates.state_dict()[key], value)


def test_windows_cover_the_schedule_and_know_what_came_before(data: list[Trajectories]) -> None:
    some = window(data, 24)
    first = some.sigmas[:, 0] == 1
    assert first.any() and not first.all()
    assert (some.sigma_before > some.sigmas[:, 0])[~first].all() and torch.equal(some.before[first], some.x[first, 0])
    later = data[0].draw(24, 1, torch.Generator().manual_seed(0), start=1)
    assert later.sigmas[:, 0].max() < 1 and (later.sigma_before > later.sigmas[:, 0]).all()
    for start in range(17):
        few = some.rows(slice(start, start + 8)).sigmas[:, 0].sort().values
        assert few[0] < 0.45 and few[-1] == 1 and few.diff().max() < 0.5


@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_every_evaluation_of_a_run_counts_the_same(length: int, data: list[Trajectories]) -> None:
    """Those at the ends are in fewer windows."""
    some, weight = data[0].draw(4000, length, torch.Generator().manual_seed(0)), torch.zeros(4)
    assert some.length == min(length, 4)
    index = (some.sigmas[:, :-1, None] - torch.tensor([1.0, 0.75, 0.5, 0.25])).abs().argmin(-1)
    weight.index_add_(0, index.flatten(), some.share.flatten())
    torch.testing.assert_close(weight / 4000, torch.full((4,), 0.25), rtol=0, atol=0.02)


def test_a_run_is_steered_by_its_guidance(data: list[Trajectories]) -> None:
    """The kept velocities lead from each kept point to the next, the last one to sigma 0."""
    data = data[0]
    assert data.cfg.min() >= 1 and data.cfg.max() <= 3
    cond, uncond = data.velocity.float().unbind(2)
    guided = uncond + data.cfg[:, None, None, None, None] * (cond - uncond)
    step = data.sigmas.diff(dim=1)[:, :, None, None, None]
    torch.testing.assert_close(data.x[:, 1:].float(), data.x[:, :-1].float() + step * guided, rtol=0, atol=0.02)
    assert data.sigmas[:, -1].abs().max() == 0 and (data.sigmas[:, 1:-1].diff(dim=1) < 0).all()


def test_a_team_records_what_one_process_records(teacher: Teacher, data: list[Trajectories]) -> None:
    data = data[0]
    shares = Trajectories(data.x.clone(), torch.zeros_like(data.velocity), data.sigmas, data.cfg, data.conditioning,
                          torch.zeros_like(data.made))
    for rank in range(2):
        record(teacher, shares, batch=2, team=Team(rank, 2))
    torch.testing.assert_close(shares.velocity, data.velocity, rtol=0, atol=0.02)


def test_runs_in_files_are_made_once(teacher: Teacher, tmp_path: Path) -> None:
    """As a kill would leave them: the second run half made."""
    prompts = torch.randn(2, 3, 8), torch.randn(2, 8)
    noise, schedule = torch.randn(2, 2, 8, 8), teacher.schedule(4)

    def planned(folder: Path | None) -> Trajectories:
        return plan_runs(prompts, prompts, noise, schedule, torch.Generator().manual_seed(3), folder=folder)

    alone, kept = planned(None), planned(tmp_path)
    for plan in (alone, kept):
        record(teacher, plan, batch=1)
    assert torch.equal(kept.x, alone.x) and torch.equal(kept.velocity, alone.velocity) and kept.velocity.shape[2] == 1
    kept.made[1], kept.velocity[1], kept.x[1, 2:] = 0, 0, 0
    kept.x[0, 4] = 5.0
    again = planned(tmp_path)
    record(teacher, again, batch=1)
    assert torch.equal(again.velocity, alone.velocity) and torch.equal(again.x[1], alone.x[1])
    assert (again.x[0, 4] == 5).all(), "the first run was not made again"


def test_pictures_lie_at_the_end_of_straight_lines(teacher: Teacher, tmp_path: Path) -> None:
    """All points are known beforehand, and stay; recorded is what the dense model says there."""
    prompts, generator = (torch.randn(3, 3, 8), torch.randn(3, 8)), torch.Generator().manual_seed(3)
    noise, latents = torch.randn(3, 2, 8, 8), torch.randn(3, 2, 8, 8)
    plan = plan_runs(prompts, prompts, noise, teacher.schedule(4), generator, folder=tmp_path, latents=latents)
    level = plan.sigmas[:, :, None, None, None]
    line = ((1 - level) * latents[:, None] + level * noise[:, None]).half()
    torch.testing.assert_close(plan.x, line)
    before = plan.x.clone()
    record(teacher, plan, batch=2)
    assert torch.equal(plan.x, before) and plan.made.all() and torch.equal(plan.x[:, -1], latents.half())
    said = teacher.velocity(plan.x[:, 2].float(), plan.sigmas[:, 2], *prompts)
    torch.testing.assert_close(plan.velocity[:, 2, 0].float(), said, rtol=0, atol=0.01)


def test_calibration_knows_what_a_threshold_keeps(teacher: Teacher, data: list[Trajectories]) -> None:
    torch.manual_seed(2)
    scores = TokenScores(3, 64, 4, bias=0.3)
    with torch.no_grad():
        scores.up.normal_(0, 0.1)
        scores.weight.normal_(0, 0.1)
    recipe = replace(RECIPE, window=2)
    table = calibrate(teacher, Gates(scores), data, recipe, shift=0.2, samples=256, bins=2)
    assert (table.quantiles.diff(dim=-1) >= 0).all()
    some = window(data, 256, 2)
    with torch.no_grad():
        current = roll_out(teacher, Gates(scores), some, 0.2, [None] * 2).passes[1]
    kept = torch.stack([current.gates[block] for block in range(3)]).mean((1, 2))
    quantiles = table.at(some.sigmas[:, 1])
    expected = fraction_above(quantiles, torch.full(quantiles.shape[:2], -0.2, dtype=torch.float64))
    torch.testing.assert_close(expected.mean(0).float(), kept, rtol=0, atol=0.06)


def test_an_interrupted_step_leaves_no_trace(teacher: Teacher, data: list[Trajectories], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the second of its two groups."""
    whole, part = fresh(teacher, data), fresh(teacher, data)
    train_step(whole, teacher, data, RECIPE)
    backward, calls = Tensor.backward, []

    def stopped(self: Tensor) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt
        backward(self)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Tensor, "backward", stopped)
        train_step(part, teacher, data, RECIPE)
    assert not part.gauge.any() and not part.losses
    part.optimizer.zero_grad()
    train_step(part, teacher, data, RECIPE)
    assert torch.equal(part.gauge, whole.gauge) and part.losses == whole.losses


def test_told_gates_differ_by_budget_and_can_stand_alone(teacher: Teacher, data: list[Trajectories]) -> None:
    recipe = replace(RECIPE, told=True)
    run = fresh(teacher, data, recipe)
    for _ in range(4):
        train_step(run, teacher, data, recipe)
    now, image, text = window(data), torch.randn(3, 16, 64), torch.randn(3, 3, 64)
    seen = Gate(1, 0.5, image, torch.randn(3, 64), lambda: image, text, lambda: text)
    logits = [run.gates.at(level).tokens(seen) for level in range(3)]
    assert (logits[0] - logits[2]).abs().max() > 1e-3
    torch.testing.assert_close(run.gates.at(2).tokens.alone()(seen), logits[2])
    assert single(teacher, run.gates.at(1), now, 0.0)[1].isfinite().all()
    assert fresh(teacher, data).gates.at(1).tokens is not None


def test_a_loss_that_is_no_number_is_told_and_changes_nothing(teacher: Teacher, data: list[Trajectories]) -> None:
    run = fresh(teacher, data)
    before = run.gates.tokens.bias.clone()
    broken = [replace(data[0], velocity=torch.full_like(data[0].velocity, torch.inf))]
    with pytest.raises(Diverged, match="loss of step 1 is .*lower rate"):
        train_step(run, teacher, broken, RECIPE)
    assert torch.equal(run.gates.tokens.bias, before) and run.step == 0 and not run.losses
