"""Dense sampling runs of a frozen model, kept: what a router trains on and is calibrated with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.flux import Flux
from .team import Team


@dataclass(frozen=True)
class Samples:
    """Model inputs and the dense velocity; x and velocity are [rows, C, H, W], sigma [rows]."""

    x: Tensor
    sigma: Tensor
    context: Tensor
    pooled: Tensor
    velocity: Tensor

    def rows(self, team: Team) -> Samples:
        """One member's rows."""
        return Samples(*(team.rows(part) for part in (self.x, self.sigma, self.context, self.pooled, self.velocity)))


@dataclass(frozen=True)
class Trajectories:
    """Euler runs: x and velocity [runs, steps, C, H, W] in half precision, sigmas [runs, steps] falling."""

    x: Tensor
    velocity: Tensor
    sigmas: Tensor
    context: Tensor
    pooled: Tensor

    def at(self, run: Tensor, step: Tensor) -> Samples:
        """The evaluations `step` [rows] of the runs `run` [rows]."""
        return Samples(self.x[run, step].float(), self.sigmas[run, step], self.context[run], self.pooled[run],
                       self.velocity[run, step].float())

    def draw(self, rows: int, generator: torch.Generator) -> tuple[Samples, Samples]:
        """`rows` random evaluations, spread evenly over the schedule, and the evaluations before them.

        The first evaluation of a run is before itself: nothing is older.
        """
        runs, steps = self.sigmas.shape
        run = torch.randint(runs, (rows,), generator=generator)
        step = (torch.arange(rows) + torch.rand(rows, generator=generator)).mul(steps / rows).long().clamp(max=steps - 1)
        return self.at(run, step), self.at(run, (step - 1).clamp(min=0))

    def share(self) -> Trajectories:
        """Move everything into shared memory."""
        for tensor in (self.x, self.velocity, self.sigmas, self.context, self.pooled):
            tensor.share_memory_()
        return self


@torch.no_grad()
def record(model: Flux, context: Tensor, pooled: Tensor, noise: Tensor, steps: int, jitter: float = 0.0,
           generator: torch.Generator | None = None, batch: int = 16) -> Trajectories:
    """Run `model` for each prompt from each `noise` [runs, C, H, W] over sigmas 1 … 0 in `steps` Euler steps.

    With `jitter` (in steps, below 0.5) every level but the first is moved at random, so that all sigmas are seen.
    """
    runs = len(noise)
    levels = torch.linspace(1, 0, steps + 1)[:-1].repeat(runs, 1)
    if jitter:
        levels[:, 1:] += (2 * torch.rand(runs, steps - 1, generator=generator) - 1) * jitter / steps
    ends = torch.cat((levels[:, 1:], torch.zeros(runs, 1)), dim=1)
    x_kept = torch.empty(runs, steps, *noise.shape[1:], dtype=torch.float16)
    v_kept = torch.empty_like(x_kept)
    for start in range(0, runs, batch):
        rows = slice(start, start + batch)
        x = noise[rows]
        for step in range(steps):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                velocity = model(x, levels[rows, step], context[rows], pooled[rows]).float()
            x_kept[rows, step], v_kept[rows, step] = x.half(), velocity.half()
            x = x + (ends[rows, step] - levels[rows, step])[:, None, None, None] * velocity
    return Trajectories(x_kept, v_kept, levels, context, pooled)
