"""Writes a router's capacity table: how its logits are spread, per block and noise level."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.flux import Flux
from ..routers.token import CapacityTable
from .gates import Gates, TrainingPass
from .router import routed
from .trajectories import Samples, Trajectories

BINS, LEVELS = 10, 33


@torch.no_grad()
def calibrate(model: Flux, gates: Gates, data: Trajectories, shift: float, samples: int = 512,
              bins: int = BINS, batch: int = 16) -> CapacityTable:
    """Quantiles of the logits over random evaluations of `data`, in `bins` equal ranges of sigma.

    The gates stand at `shift` meanwhile (that of a middling budget): what a router sees after skipped tokens differs
    from what it sees in the dense model.
    """
    generator = torch.Generator().manual_seed(0)
    seen: list[list[Tensor]] = [[] for _ in range(bins)]
    edges = torch.linspace(0, 1, bins + 1)[1:]
    for _ in range(0, samples, batch):
        now, _ = data.draw(batch, generator)
        logits = _logits(model, gates, now, shift)
        for row, place in enumerate(torch.bucketize(now.sigma, edges).clamp(max=bins - 1).tolist()):
            seen[place].append(logits[:, row])
    levels = torch.linspace(0, 1, LEVELS)
    quantiles = torch.stack([torch.cat(part, dim=1).quantile(levels, dim=1).T for part in seen], dim=1)
    return CapacityTable(quantiles.contiguous(), edges)


def _logits(model: Flux, gates: Gates, samples: Samples, shift: float) -> Tensor:
    """[blocks, rows, tokens]."""
    current = TrainingPass(gates, samples.context.shape[1], samples.sigma, shift)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routed(model, current, samples)
    return torch.stack(current.logits)
