"""A training of one of the class-conditional demo models, in a working directory that it is continued from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..models.dit import DiT
from ..models.latte import Latte
from ..train.base import Objective, Run, Stage, load, new_run, share, train, use_bfloat16_blocks
from ..train.dynamic import router_pace
from ..train.team import Team, together
from .data import Log


@dataclass(frozen=True)
class Phase:
    """One training of one network: `checkpoint` is a name in the working directory."""

    checkpoint: str
    stages: tuple[Stage, ...]
    objective: Objective


def train_phase(work: Path, model: DiT | Latte, phase: Phase, seed: int, processes: int, log: Log = print) -> None:
    """Train, or continue, `phase` in `work`."""
    run = new_run(model, seed, router_pace)
    checkpoint = work / phase.checkpoint
    if checkpoint.exists():
        load(run, checkpoint)
        log(f"continuing at step {run.step}")
    if run.step >= sum(stage.steps for stage in phase.stages):
        return
    share(run)
    numbers = sum(param.numel() for param in run.ema.values())
    together(_train_member, processes, numbers, run, phase, checkpoint, log)


def _train_member(team: Team, run: Run, phase: Phase, checkpoint: Path, log: Log) -> None:
    use_bfloat16_blocks(run.model.blocks)
    train(run, phase.objective, phase.stages, checkpoint, log, team=team)


def averaged(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a finished phase: the average where there is one."""
    state = torch.load(checkpoint, weights_only=True)
    return {**state["model"], **state["ema"]}
