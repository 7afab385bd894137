"""Dense sampling runs of a frozen model, kept: what gates are trained on and calibrated with.

A guided run evaluates the prompt or class (cond) and none (uncond) at the same points; both are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from ..sampling import unsqueezed
from .teacher import Teacher
from .team import Team

# The fractional part of its multiples visits any length evenly.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Window:
    """K consecutive evaluations of one branch of each of some runs.

    `x` [rows, K + 1, C, H, W]: the points of the dense run, with the one that follows the window; `sigmas` [rows, K + 1].
    Videos have their frames after C. `velocity` [rows, K, C, H, W] of the dense model there; `pull` [rows]: how much of it moves the picture (1; the guidance
    for cond of a guided run, 1 − guidance for uncond). `before`, `sigma_before`: the evaluation ahead of the window, itself
    at the start of a run. `share` [rows, K]: what an evaluation counts in the mean over all that windows begin at or reach.
    `conditioning`, each [rows, …]: see `sampling.Velocity`.
    """

    x: Tensor
    sigmas: Tensor
    velocity: Tensor
    pull: Tensor
    before: Tensor
    sigma_before: Tensor
    share: Tensor
    conditioning: tuple[Tensor, ...]

    @property
    def length(self) -> int:
        return self.velocity.shape[1]

    def rows(self, some: slice) -> Window:
        return self._with(lambda part: part[some])

    def to(self, device: torch.device) -> Window:
        return self._with(lambda part: part.to(device))

    def _with(self, change: Callable[[Tensor], Tensor]) -> Window:
        parts = (getattr(self, field.name) for field in fields(self))
        return Window(*(tuple(map(change, part)) if isinstance(part, tuple) else change(part) for part in parts))


@dataclass(frozen=True)
class Trajectories:
    """Euler runs: `x` [runs, steps + 1, C, H, W] and `velocity` [runs, steps, branches, C, H, W] in half precision; videos have
    their frames after C.

    Branches are cond and, in guided runs, uncond. `sigmas` [runs, steps + 1] fall to 0; `cfg` [runs] is the guidance each run
    was steered with; `conditioning`, each [runs, branches, …], are the prompts or classes; `made` [runs]
    is 1 where a run is recorded. `straight`: the points were there beforehand, and are no Euler steps.
    """

    x: Tensor
    velocity: Tensor
    sigmas: Tensor
    cfg: Tensor
    conditioning: tuple[Tensor, ...]
    made: Tensor
    straight: bool = False

    @property
    def steps(self) -> int:
        return self.velocity.shape[1]

    def draw(self, rows: int, length: int, generator: torch.Generator, start: int = 0) -> Window:
        """`rows` random windows of `length` evaluations from number `start` on, or of all those where they are fewer; any few
        neighbours are spread over the schedule."""
        runs, branches, steps = len(self.x), self.velocity.shape[2], self.steps - start
        length = min(length, steps)
        places = steps - length + 1
        run = torch.randint(runs, (rows,), generator=generator)
        branch = torch.randint(branches, (rows,), generator=generator)
        spread = (torch.arange(rows) * GOLDEN + torch.rand(1, generator=generator)) % 1
        first = (spread * places).long().clamp(max=places - 1)
        at = start + first[:, None] + torch.arange(length + 1)
        before, each = (at[:, 0] - 1).clamp(min=0), run[:, None]
        covered = torch.zeros(steps).index_add_(0, (torch.arange(places)[:, None] + torch.arange(length)).flatten(), torch.ones(places * length))
        cfg = self.cfg[run]
        return Window(
            x=self.x[each, at].float(),
            sigmas=self.sigmas[each, at],
            velocity=self.velocity[each, at[:, :-1], branch[:, None]].float(),
            pull=torch.where(branch == 0, cfg, 1 - cfg) if branches == 2 else torch.ones(rows),
            before=self.x[run, before].float(),
            sigma_before=self.sigmas[run, before],
            share=(places / steps) / covered[at[:, :-1] - start],
            conditioning=tuple(part[run, branch] for part in self.conditioning),
        )


def plan_runs(given: tuple[Tensor, ...], empty: tuple[Tensor, ...], noise: Tensor, schedule: Sequence[float],
              generator: torch.Generator, cfg: tuple[float, float] = (1.0, 1.0), jitter: float = 0.45,
              folder: Path | None = None, latents: Tensor | None = None) -> Trajectories:
    """Runs still to `record`: one for each row of `given`, from each `noise` [runs, C, H, W] (of spread 1) at the first noise level of
    `schedule` [steps + 1].

    Guidance is drawn from the range `cfg`; there is no uncond where that is 1. Every sigma but the first and the last is
    moved by up to `jitter` (below 0.5) of the way to the next, so that all are seen. `given` and `empty` are conditioning
    (see `sampling.Velocity`), `empty` with one row. In a `folder` the runs are kept in files, and those that are there are not made again.
    With `latents` like `noise`, of pictures, the path is the straight line to them, and only velocities are still to record.
    """
    runs, steps = len(noise), len(schedule) - 1
    levels = torch.tensor(schedule).repeat(runs, 1)
    moved = (2 * torch.rand(runs, steps - 1, generator=generator) - 1) * jitter
    gaps = -torch.tensor(schedule).diff()
    levels[:, 1:-1] -= moved * torch.where(moved > 0, gaps[1:], gaps[:-1])
    guidance = cfg[0] + (cfg[1] - cfg[0]) * torch.rand(runs, generator=generator)
    both = [given] if cfg == (1.0, 1.0) else [given, tuple(none.expand_as(one) for one, none in zip(given, empty))]
    conditioning = tuple(torch.stack(parts, dim=1) for parts in zip(*both))

    def room(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype) if folder is None else mapped(folder / f"{steps}_{name}.bin", shape, dtype)

    x = room("x", (runs, steps + 1, *noise.shape[1:]), torch.float16)
    velocity = room("velocity", (runs, steps, len(both), *noise.shape[1:]), torch.float16)
    made = room("made", (runs,), torch.uint8)
    new = made == 0
    if latents is None:
        x[:, 0][new] = (schedule[0] * noise).half()[new]
    else:
        x[new] = torch.lerp(latents[:, None].float(), noise[:, None], unsqueezed(levels, x)).half()[new]
    return Trajectories(x, velocity, levels, guidance, conditioning, made, latents is not None)


def mapped(path: Path, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor that is the file: what is written to it is there after a kill, and for every process. New ones hold zeros."""
    size = torch.Size(shape).numel()
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        # Taken now: a disk that fills up later would kill the process that writes.
        take = os.posix_fallocate if hasattr(os, "posix_fallocate") else lambda number, _, length: os.truncate(number, length)
        take(file.fileno(), 0, size * dtype.itemsize)
    return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


@torch.no_grad()
def record(teacher: Teacher, plan: Trajectories, batch: int = 4, team: Team = Team(), told: Callable[[], None] = lambda: None) -> None:
    """Make the runs of `plan` that are not there, `batch` at a time; each member of a team makes its share. `told` is called
    after every batch."""
    for start in range(batch * team.rank, len(plan.x), batch * team.size):
        runs = slice(start, start + batch)
        if not plan.made[runs].all():
            _record(teacher, plan, runs)
            plan.made[runs] = 1
            told()
    team.wait()


def _record(teacher: Teacher, plan: Trajectories, runs: slice) -> None:
    branches = plan.velocity.shape[2]
    conditioning = tuple(part[runs].flatten(0, 1).to(teacher.device) for part in plan.conditioning)
    cfg = unsqueezed(plan.cfg[runs], plan.x[runs, 0]).to(teacher.device)
    x = plan.x[runs, 0].float().to(teacher.device)
    for step in range(plan.steps):
        sigma, following = plan.sigmas[runs, step : step + 2].to(teacher.device).unbind(1)
        found = teacher.velocity(x.repeat_interleave(branches, 0), sigma.repeat_interleave(branches), *conditioning).float()
        parts = found.unflatten(0, (-1, branches))
        plan.velocity[runs, step] = parts.half().cpu()
        if plan.straight:
            x = plan.x[runs, step + 1].float().to(teacher.device)
            continue
        velocity = parts[:, 0] if branches == 1 else torch.lerp(parts[:, 1], parts[:, 0], cfg)
        x = x + unsqueezed(following - sigma, x) * velocity
        plan.x[runs, step + 1] = x.half().cpu()
