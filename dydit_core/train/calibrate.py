"""Writes a router's capacity table: how its logits are spread, per block and noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..routers.token import CapacityTable
from .gates import Gates
from .rollout import roll_out
from .router import Recipe
from .teacher import Teacher
from .trajectories import Trajectories

BINS, LEVELS = 10, 33


@torch.no_grad()
def calibrate(teacher: Teacher, gates: Gates, data: Sequence[Trajectories], recipe: Recipe, shift: float, samples: int = 512,
              bins: int = BINS) -> CapacityTable:
    """Quantiles of the logits over at least `samples` random evaluations of `data`, in `bins` equal ranges of the noise's share.

    The gates stand at `shift` meanwhile (that of a middling budget), and evaluations follow one another as they did in
    training: what a router sees after skipped tokens differs from what it sees in the dense model.
    """
    generator = torch.Generator().manual_seed(0)
    seen: list[list[Tensor]] = [[] for _ in range(bins)]
    edges = torch.linspace(0, 1, bins + 1)[1:]
    while sum(part.shape[1] for found in seen for part in found) < samples * teacher.tokens(data[0].x):
        for runs in data:
            window = runs.draw(recipe.group, recipe.window, generator, recipe.first).to(teacher.device)
            outcome = roll_out(teacher, gates, window, shift, [None] * window.length, recipe.tau, recipe.reuse)
            for step, current in enumerate(outcome.passes):
                logits = torch.stack([current.logits[block] for block in range(gates.tokens.blocks)]).cpu()
                for row, place in enumerate(torch.bucketize(teacher.level(window.sigmas[:, step]).cpu().contiguous(), edges).clamp(max=bins - 1).tolist()):
                    seen[place].append(logits[:, row])
    levels = torch.linspace(0, 1, LEVELS)
    nearest = [min((other for other in range(bins) if seen[other]), key=lambda other: abs(other - place)) for place in range(bins)]
    # A block at a time: torch refuses quantiles of more than 16 million numbers.
    quantiles = torch.stack([torch.stack([block.quantile(levels) for block in torch.cat(seen[place], dim=1)]) for place in nearest], dim=1)
    return CapacityTable(quantiles.contiguous(), _as_sigmas(edges, float(data[0].sigmas.max())) if teacher.eps else edges)


def _as_sigmas(levels: Tensor, highest: float) -> Tensor:
    """Those of the shares of noise `levels` (see `Teacher.level`); nothing is above the schedule's highest."""
    return (levels / (1 - levels).clamp(min=1e-9)).clamp(max=highest)
