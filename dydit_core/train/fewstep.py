"""Teaches a FLUX to take a few Euler steps where it took many; a LoRA learns it, the base stays frozen.

Trajectory distillation without data (after progressive distillation, arXiv 2202.00512): the teacher's run is a fixed map
from noise to picture, and only its points at the student's few sigmas are kept. A student's step should end where the
teacher's path is by then, so its velocity is the teacher's average over the step. First every step starts on the
teacher's path; then the student walks on its own from the noise, and the gradient goes through all of its steps, since
what an early step leaves wrong is what the later ones start from.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..lora import LoRA, new_lora
from ..models.flux import Flux
from .base import create_state
from .resume import resume, save
from .team import Team, share

# Rows that a member of a team takes at a time; the graphs of all their steps are held together.
PORTION = 4
WARM_STEPS = 20

Log = Callable[[str], None]


@dataclass(frozen=True)
class Paths:
    """Runs of the teacher: points `x` [runs, steps + 1, C, H, W] at the falling `sigmas` [steps + 1], of which the last is
    0; the prompts are `context` [runs, tokens, dim] and `pooled` [runs, dim]."""

    x: Tensor
    sigmas: Tensor
    context: Tensor
    pooled: Tensor

    def rows(self, some: Tensor | slice) -> Paths:
        return Paths(self.x[some].float(), self.sigmas, self.context[some], self.pooled[some])


@dataclass(frozen=True)
class Recipe:
    """`forced`: for which part of the `steps` (optimizer steps) the student starts on the teacher's path."""

    steps: int
    batch: int = 8
    rate: float = 2.5e-4
    rank: int = 32
    forced: float = 0.3


@dataclass
class FewStepRun:
    """Everything a checkpoint holds, and the seed."""

    lora: LoRA
    optimizer: torch.optim.Optimizer
    seed: int = 0
    step: int = 0

    @property
    def params(self) -> list[Tensor]:
        return list(self.lora.parameters())


def new_few_step_run(model: Flux, recipe: Recipe, checkpoint: Path, seed: int = 0) -> FewStepRun:
    """As it was saved in `checkpoint`, or from the start; in shared memory."""
    torch.manual_seed(seed)
    run = FewStepRun(lora := new_lora(model, recipe.rank), torch.optim.Adam(lora.parameters(), lr=0.0, betas=(0.9, 0.99)), seed)
    create_state(run.optimizer)
    run.step = resume(checkpoint, run.lora, run.optimizer)
    share(run.optimizer)
    return run


def distances(model: Flux, paths: Paths, forced: bool) -> Tensor:
    """Mean squared distance [steps] to the teacher's path at the end of every step of the student.

    A forced step starts on that path: its distance is that of the velocity to the teacher's average one, times the step.
    """
    x, found = paths.x[:, 0], []
    for step, (sigma, following) in enumerate(zip(paths.sigmas, paths.sigmas[1:])):
        start = paths.x[:, step] if forced else x
        velocity = model(start, sigma.expand(len(start)), paths.context, paths.pooled)
        x = start + (following - sigma) * velocity.float()
        found.append((x - paths.x[:, step + 1]).square().mean())
    return torch.stack(found)


def train(run: FewStepRun, model: Flux, paths: Paths, recipe: Recipe, checkpoint: Path, examine: Callable[[], str],
          log: Log = print, save_every: int = 50, team: Team = Team()) -> None:
    """Take the steps of `recipe` that `run` has not taken yet; what `examine` says is logged wherever `checkpoint` is saved.

    The LoRA of `run` must be beside `model`.
    """
    clock, losses = time.monotonic(), []
    while run.step < recipe.steps:
        losses.append(train_step(run, model, paths, recipe, team))
        if team.leads and (run.step % save_every == 0 or run.step == recipe.steps):
            seconds = (time.monotonic() - clock) / len(losses)
            save(checkpoint, run.lora, run.optimizer, run.step)
            log(f"step {run.step} loss {sum(losses) / len(losses):.5f} {examine()} {seconds:.1f} s a step")
            clock, losses = time.monotonic(), []


def train_step(run: FewStepRun, model: Flux, paths: Paths, recipe: Recipe, team: Team = Team()) -> float:
    """One optimizer step; returns its loss (mean squared distance to the teacher's path)."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
    batch = paths.rows(torch.randint(len(paths.x), (recipe.batch,), generator=generator))
    forced, loss = run.step < recipe.forced * recipe.steps, 0.0
    for taken in team.portions(recipe.batch, PORTION):
        for start in range(taken.start, taken.stop, PORTION):
            rows = batch.rows(slice(start, start + PORTION))
            part = distances(model, rows, forced).mean() * (len(rows.x) / recipe.batch)
            part.backward()
            loss += part.item()
    loss = team.exchange(run.params, loss)
    _update(run, recipe, team)
    return loss


def _update(run: FewStepRun, recipe: Recipe, team: Team) -> None:
    warm = min(1.0, (run.step + 1) / WARM_STEPS)
    rate = recipe.rate * warm * (0.02 + 0.98 * math.cos(run.step / recipe.steps * math.pi / 2) ** 2)
    run.optimizer.param_groups[0]["lr"] = rate
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    team.wait()
    run.step += 1
