"""Dense sampling runs of a frozen model, kept: what a router trains on and is calibrated with.

A guided run evaluates the prompt (cond) and the empty prompt (uncond) at the same points; both are kept.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..models.flux import Flux
from .team import Team

# The fractional part of its multiples visits any length evenly.
GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Samples:
    """Model inputs and the dense velocity; x and velocity are [rows, C, H, W], sigma [rows]."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    pooled: Tensor
    velocity: Tensor

    def rows(self, some: slice) -> Samples:
        return Samples(*(getattr(self, field.name)[some] for field in fields(self)))


@dataclass(frozen=True)
class Trajectories:
    """Euler runs: x [runs, steps, C, H, W] and velocity [runs, steps, 2, C, H, W] (cond, uncond) in half precision.

    `sigmas` [runs, steps] fall; `cfg` [runs] is the guidance each run was steered with; `context`
    [runs, 2, tokens, dim] and `pooled` [runs, 2, dim] are both prompts.
    """

    x: Tensor
    velocity: Tensor
    sigmas: Tensor
    cfg: Tensor
    context: Tensor
    pooled: Tensor

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Samples, Samples]:
        """`rows` random evaluations and the evaluations before them; any few neighbours are spread over the schedule.

        The first evaluation of a run is before itself: nothing is older.
        """
        runs, steps = self.sigmas.shape
        run = torch.randint(runs, (rows,), generator=generator)
        branch = torch.randint(2, (rows,), generator=generator)
        place = (torch.arange(rows) * GOLDEN + torch.rand(1, generator=generator)) % 1
        step = (place * steps).long().clamp(max=steps - 1)
        return self._at(run, step, branch), self._at(run, (step - 1).clamp(min=0), branch)

    def _at(self, run: Tensor, step: Tensor, branch: Tensor) -> Samples:
        return Samples(self.x[run, step].float(), self.sigmas[run, step], self.context[run, branch],
                       self.pooled[run, branch], self.velocity[run, step, branch].float())

    def share(self) -> Trajectories:
        """Move everything into shared memory."""
        for field in fields(self):
            getattr(self, field.name).share_memory_()
        return self


def plan_runs(prompts: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor], noise: Tensor, steps: int,
              generator: torch.Generator, cfg: tuple[float, float] = (1.0, 3.0), jitter: float = 0.45) -> Trajectories:
    """Runs still to `record`: one for each prompt, from each `noise` [runs, C, H, W], over sigmas 1 … 0.

    Guidance is drawn from the range `cfg`. Every level but the first is moved by up to `jitter` steps (below 0.5), so
    that all sigmas are seen. `prompts` and `empty` are (context, pooled), `empty` with one row.
    """
    runs = len(noise)
    levels = torch.linspace(1, 0, steps + 1)[:-1].repeat(runs, 1)
    levels[:, 1:] += (2 * torch.rand(runs, steps - 1, generator=generator) - 1) * jitter / steps
    x = torch.zeros(runs, steps, *noise.shape[1:], dtype=torch.float16)
    x[:, 0] = noise.half()
    velocity = torch.zeros(runs, steps, 2, *noise.shape[1:], dtype=torch.float16)
    guidance = cfg[0] + (cfg[1] - cfg[0]) * torch.rand(runs, generator=generator)
    context, pooled = (torch.stack((one, none.expand_as(one)), dim=1) for one, none in zip(prompts, empty))
    return Trajectories(x, velocity, levels, guidance, context, pooled)


@torch.no_grad()
def record(model: Flux, plan: Trajectories, batch: int = 4, team: Team = Team()) -> None:
    """Make the runs of `plan`, `batch` at a time; each member of a team makes its share."""
    for start in range(batch * team.rank, len(plan.x), batch * team.size):
        _record(model, plan, slice(start, start + batch))
    team.wait()


def _record(model: Flux, plan: Trajectories, runs: slice) -> None:
    steps = plan.sigmas.shape[1]
    context, pooled = plan.context[runs].flatten(0, 1), plan.pooled[runs].flatten(0, 1)
    cfg = plan.cfg[runs, None, None, None]
    x = plan.x[runs, 0].float()
    for step in range(steps):
        plan.x[runs, step] = x.half()
        sigma = plan.sigmas[runs, step]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            both = model(x.repeat_interleave(2, 0), sigma.repeat_interleave(2), context, pooled).float()
        cond, uncond = both.unflatten(0, (-1, 2)).unbind(1)
        plan.velocity[runs, step] = torch.stack((cond, uncond), dim=1).half()
        following = plan.sigmas[runs, step + 1] if step + 1 < steps else torch.zeros_like(sigma)
        x = x + (following - sigma)[:, None, None, None] * (uncond + cfg * (cond - uncond))
