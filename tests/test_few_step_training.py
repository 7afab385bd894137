"""Distillation into few steps: its objective, its progress, and runs that resume exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toy_training import random_flux

from dydit_core.demo import twin
from dydit_core.sampling import sample
from dydit_core.models.flux import Flux
from dydit_core.train import fewstep
from dydit_core.train.fewstep import FewStepRun, Paths, Recipe, distances, new_few_step_run, train_step
from dydit_core.train.resume import save
from dydit_core.train.team import Team, together

RECIPE = Recipe(steps=6, batch=8, rate=5e-3, rank=4, forced=0.5)
SIGMAS = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])


def toy() -> Flux:
    return random_flux(32, (4, 6, 6))


def inputs(rows: int = 12) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts and noise."""
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(shape, generator=generator) for shape in ((rows, 3, 8), (rows, 8), (rows, 2, 8, 8)))


@pytest.fixture(scope="module")
def model() -> Flux:
    return toy()


@pytest.fixture(scope="module")
def paths(model: Flux) -> Paths:
    context, pooled, noise = inputs()
    return Paths(twin.teacher_points(model, context, pooled, noise), SIGMAS, context, pooled)


def train(run: FewStepRun, model: Flux, paths: Paths, recipe: Recipe, checkpoint: Path, team: Team = Team()) -> None:
    with run.lora.beside(model):
        fewstep.train(run, model, paths, recipe, checkpoint, examine=lambda: "", log=lambda line: None, team=team)


def test_the_path_is_the_teachers_run_at_the_students_sigmas(model: Flux, paths: Paths) -> None:
    context, pooled, noise = inputs()
    assert paths.x.shape == (12, 5, 2, 8, 8) and paths.x.dtype == torch.float16
    torch.testing.assert_close(paths.x[:, 0].float(), noise, rtol=1e-3, atol=1e-3)
    end = sample(model, (context, pooled), noise, steps=20)
    torch.testing.assert_close(paths.x[:, 4].float(), end, rtol=1e-3, atol=1e-3)
    # The teacher goes on from its own point: 15 further steps of 1/20 from sigma 0.75.
    x = noise
    for step in range(5):
        x = x - model(x, torch.full((12,), 1 - step / 20), context, pooled) / 20
    torch.testing.assert_close(paths.x[:, 1].float(), x, rtol=1e-3, atol=1e-3)


def test_a_forced_step_aims_at_the_average_velocity(model: Flux, paths: Paths) -> None:
    some = paths.rows(slice(0, 3))
    found = distances(model, some, forced=True)
    for step, sigma in enumerate((1.0, 0.75, 0.5, 0.25)):
        average = (some.x[:, step] - some.x[:, step + 1]) / 0.25
        velocity = model(some.x[:, step], torch.full((3,), sigma), some.context, some.pooled)
        expected = (velocity - average).square().mean() * 0.25**2
        torch.testing.assert_close(found[step], expected, rtol=1e-4, atol=0)


def test_a_free_step_starts_where_the_student_is(model: Flux, paths: Paths) -> None:
    some = paths.rows(slice(0, 3))
    end = sample(model, (some.context, some.pooled), some.x[:, 0], steps=4)
    found = distances(model, some, forced=False)
    torch.testing.assert_close(found[3], (end - some.x[:, 4]).square().mean(), rtol=1e-4, atol=0)


def test_an_early_step_learns_from_what_its_error_becomes(model: Flux, paths: Paths) -> None:
    """The gradient of the last point reaches the velocity of the first step."""
    velocities = []

    def watched(*args: Tensor) -> Tensor:
        velocities.append(model(*args).requires_grad_())
        return velocities[-1]

    distances(watched, paths.rows(slice(0, 2)), forced=False)[3].backward()
    assert len(velocities) == 4 and velocities[0].grad.abs().max() > 0


@pytest.mark.parametrize("forced", [1.0, 0.0])
def test_training_brings_the_student_to_the_path(forced: float, model: Flux, paths: Paths, tmp_path: Path) -> None:
    recipe = replace(RECIPE, steps=60, forced=forced)
    run = new_few_step_run(model, recipe, tmp_path / "run.pt")

    def error() -> float:
        with torch.no_grad(), run.lora.beside(model):
            return distances(model, paths.rows(slice(None)), forced=False)[3].item()

    before = error()
    train(run, model, paths, recipe, tmp_path / "run.pt")
    assert error() < 0.6 * before
    assert all(param.grad is None for param in model.parameters())


def test_a_run_resumes_exactly(model: Flux, paths: Paths, tmp_path: Path) -> None:
    """Over the change from forced steps to free ones."""
    whole, part = (new_few_step_run(model, RECIPE, tmp_path / "absent.pt") for _ in range(2))
    with whole.lora.beside(model):
        losses = [train_step(whole, model, paths, RECIPE) for _ in range(6)]
    with part.lora.beside(model):
        for _ in range(2):
            train_step(part, model, paths, RECIPE)
    save(tmp_path / "part.pt", part.lora, part.optimizer, part.step)
    resumed = new_few_step_run(model, RECIPE, tmp_path / "part.pt")
    assert resumed.step == 2
    with resumed.lora.beside(model):
        assert [train_step(resumed, model, paths, RECIPE) for _ in range(4)] == losses[2:]
    assert all(torch.equal(one, other) for one, other in zip(whole.params, resumed.params))


def member(team: Team, run: FewStepRun, checkpoint: Path) -> None:
    model = toy()
    context, pooled, noise = inputs()
    paths = Paths(twin.teacher_points(model, context, pooled, noise), SIGMAS, context, pooled)
    train(run, model, paths, RECIPE, checkpoint, team)


def test_a_team_of_two_takes_the_steps_of_one(model: Flux, tmp_path: Path) -> None:
    runs = []
    for size in (1, 2):
        path = tmp_path / f"{size}.pt"
        run = new_few_step_run(model, RECIPE, path)
        together(member, size, sum(param.numel() for param in run.params), run, path)
        runs.append(new_few_step_run(model, RECIPE, path))
        assert runs[-1].step == 6
    for one, other in zip(*(run.params for run in runs)):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
    assert any(up.abs().max() > 1e-3 for up in runs[0].lora.up)


def test_runs_are_kept_in_parts_and_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the base: the velocity that leads any noise to zero. The second part is lost and made again."""
    monkeypatch.setattr(twin, "PART", 2)
    made = []

    def straight(x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        made.append(len(x))
        return x / sigma[:, None, None, None]

    for rank in range(2):
        twin.record_paths(straight, tmp_path, 5, Team(rank, 2), log=lambda line: None)
    assert sum(made) == 3 * 2 * 20
    whole = twin.load_paths(tmp_path, 5)
    assert whole.x.shape[:2] == (6, 5) and whole.context.shape[0] == whole.pooled.shape[0] == 6
    torch.testing.assert_close(whole.x[:, 2].float(), whole.x[:, 0].float() / 2, rtol=0, atol=5e-3)
    sorted(tmp_path.rglob("*.pt"))[1].unlink()
    twin.record_paths(straight, tmp_path, 5, log=lambda line: None)
    assert sum(made) == 4 * 2 * 20 and torch.equal(twin.load_paths(tmp_path, 5).x, whole.x)


def test_no_run_starts_from_a_noise_of_the_held_out_pictures() -> None:
    noise = twin._started(0)[2]
    for seed in range(16):
        held_out = torch.randn(noise.shape[1:], generator=torch.Generator().manual_seed(seed))
        assert (noise - held_out).square().mean(dim=(1, 2, 3)).min() > 1
