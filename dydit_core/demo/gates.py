"""Gates for one of the demo's models: trained by a team of processes, and held to their budgets."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ..budget import Plan
from ..checkpoints.adapter import Adapter, load_adapter, save_adapter
from ..methods import as_trained
from ..sampling import Conditioning, sample
from ..standalone import Budgeted
from ..storage import write_atomically
from ..train.base import prefer_plain_attention
from ..train.examples import Examples
from ..train.router import RouterRun, share, summary
from ..train.session import ADAPTER, Job, begin, claim, plan, train
from ..train.teacher import Teacher
from ..train.team import Team, together
from .data import Log

CHECKED_BUDGETS = (0.9, 0.75, 0.5)
TOLERANCE = 0.02

Teach = Callable[[nn.Module], Teacher]


def train_gates(folder: Path, job: Job, model: nn.Module, teach: Teach, examples: Examples, processes: int, log: Log) -> None:
    """Train, or continue, the gates of `job` for `model` in `folder`, where their adapter is then; `teach` makes a teacher of the
    model in every process."""
    teacher = teach(model)
    claim(folder, job, teacher, examples)
    run = begin(job, teacher, plan(job, teacher, examples, folder), folder)
    if run.step:
        log(f"continuing at step {run.step}")
    model.share_memory()
    share(run)
    together(_member, processes, sum(param.numel() for param in run.params), run, job, model, teach, examples, folder, log)


def _member(team: Team, run: RouterRun, job: Job, model: nn.Module, teach: Teach, examples: Examples, folder: Path, log: Log) -> None:
    prefer_plain_attention()
    teacher, clock = teach(model), time.monotonic()

    def watch(run: RouterRun) -> None:
        nonlocal clock
        if run.step % 25 == 0 or run.step == job.recipe.steps:
            seconds, clock = time.monotonic() - clock, time.monotonic()
            log(f"step {run.step} {summary(run, job.recipe)} {seconds:.0f} s")

    train(run, job, teacher, plan(job, teacher, examples, folder), folder, watch, team=team)


def publish(folder: Path, target: Path) -> Adapter:
    """Write the adapter that a training left in `folder` to `target`."""
    adapter = load_adapter(folder / ADAPTER)
    write_atomically(target, lambda partial: save_adapter(partial, adapter))
    return adapter


def check(teacher: Teacher, adapter: Adapter, conditioning: Conditioning, size: Sequence[int], counts: Sequence[int], log: Log) -> None:
    """Run what `conditioning` asks for, in latents of `size`, at every checked budget; raises RuntimeError where the achieved
    budget is not the asked one."""
    method = as_trained(adapter.router)
    noise = torch.randn(len(conditioning[0]), *size, generator=torch.Generator().manual_seed(0))
    for steps in counts:
        floor, schedule = 0.0, teacher.schedule(steps)
        for budget in (0.0, *CHECKED_BUDGETS):  # asked for nothing, it spends its floor
            with Budgeted(teacher.model, Plan(budget), method, schedule) as budgeted:
                sample(budgeted, conditioning, schedule[0] * noise, steps, schedule=schedule)
            kept = np.mean([evaluation.mask().mean((1, 2)) for evaluation in budgeted.spent.evaluations], axis=0)
            achieved = budgeted.spent.achieved
            floor = floor or achieved
            log(f"{steps} steps: asked {budget:g}, spent {achieved:.3f}, kept per block {' '.join(f'{part:.2f}' for part in kept)}")
            if abs(achieved - max(budget, floor)) > TOLERANCE:
                raise RuntimeError(f"The adapter spends {achieved:.3f} where {budget:g} was asked ({steps} steps).")
