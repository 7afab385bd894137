"""Sampling under a budget without ComfyUI: the demo page, the benchmarks and the tests run through this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from .backend import TorchBackend
from .budget import Plan
from .blocks import Backend
from .families.known import family_of
from .recorder import Recorder
from .runtime import Branches, Method, Run, running
from .sampling import Velocity
from .trace import Evaluation

BACKEND = TorchBackend()


@dataclass(frozen=True)
class Spent:
    """`achieved`: block FLOPs ÷ dense; `evaluations`: what was computed where."""

    achieved: float
    evaluations: tuple[Evaluation, ...]


class Budgeted:
    """A velocity function (see `sampling.Velocity`) that runs `model` under a plan, for one sampling run.

    Each sigma is one evaluation; its first call is cond, the second uncond. Use as a context: leaving it ends the run.
    `velocity` and `backend`: how the model is run, where it needs more than what it is conditioned with and plain layers.
    Raises ValueError where the model is of no known family.
    """

    def __init__(self, model: nn.Module, plan: Plan, method: Method, schedule: Sequence[float],
                 on_evaluation: Callable[[Evaluation], None] | None = None, velocity: Velocity | None = None,
                 backend: Backend = BACKEND) -> None:
        self.family, self.backend = family_of(model), backend
        self.velocity = velocity or model.denoise_direction
        self.model, self.recorder = model, Recorder(on_evaluation, next(model.parameters()).device)
        self.run = Run(plan, method, schedule, self.recorder)
        self.spent: Spent | None = None
        self._calls = 0

    def __enter__(self) -> Budgeted:
        return self

    def __exit__(self, *error: object) -> None:
        self.run.finish()
        self.spent = Spent(self.run.ledger.achieved, self.recorder.finish())

    def __call__(self, x: Tensor, sigma: Tensor, *conditioning: Tensor) -> Tensor:
        level = float(sigma[0])
        if level != self.run.sigma:
            self.run.arrive(level)
            self._calls = 0
        self._calls += 1
        rows, patch = x.shape[0], self.model.config.patch_size
        grid = *x.shape[2:-2], x.shape[-2] // patch, x.shape[-1] // patch
        geometry = self.family.geometry(self.model, prod(grid), conditioning[0] if conditioning else None)
        cond = rows if self._calls == 1 else 0
        branches = Branches((self._calls,), slice(0, cond), slice(cond, rows))
        with running(self.run, self.family, self.model, geometry, branches, rows, grid, self.backend), torch.no_grad():
            return self.velocity(x, sigma, *conditioning)
