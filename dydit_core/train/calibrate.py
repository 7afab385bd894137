"""Writes a router's capacity table: how its logits are spread, per block and noise level."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..routers.calibration import BINS, Seen
from ..routers.token import CapacityTable
from .gates import Gates
from .rollout import roll_out
from .router import Recipe
from .teacher import Teacher
from .trajectories import Trajectories


@torch.no_grad()
def calibrate(teacher: Teacher, gates: Gates, data: Sequence[Trajectories], recipe: Recipe, shift: float, samples: int = 512,
              bins: int = BINS) -> CapacityTable:
    """Quantiles of the logits over at least `samples` random evaluations of `data`, in `bins` equal ranges of the noise's share.

    The gates stand at `shift` meanwhile (that of a middling budget), and evaluations follow one another as they did in
    training: what a router sees after skipped tokens differs from what it sees in the dense model.
    """
    generator = torch.Generator().manual_seed(0)
    seen = Seen(gates.tokens.blocks, bins)
    while seen.count < samples * teacher.tokens(data[0].x):
        for runs in data:
            window = runs.draw(recipe.group, recipe.window, generator, recipe.first).to(teacher.device)
            outcome = roll_out(teacher, gates, window, shift, [None] * window.length, recipe.tau, recipe.reuse)
            for step, current in enumerate(outcome.passes):
                levels = teacher.level(window.sigmas[:, step])
                for block in range(gates.tokens.blocks):
                    seen.put(block, levels, current.logits[block])
    return seen.table(float(data[0].sigmas.max()) if teacher.eps else None)
