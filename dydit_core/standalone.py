"""Sampling a FLUX under a budget without ComfyUI: the demo page, the benchmarks and the tests run through this."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .backend import TorchBackend
from .budget import Plan
from .blocks import Backend
from .families.flux import FluxFamily
from .models.flux import Flux
from .parts import Geometry
from .recorder import Recorder
from .runtime import Branches, Method, Run, running
from .sampling import Velocity
from .trace import Evaluation

FAMILY, BACKEND = FluxFamily(), TorchBackend()


@dataclass(frozen=True)
class Spent:
    """`achieved`: block FLOPs ÷ dense; `evaluations`: what was computed where."""

    achieved: float
    evaluations: tuple[Evaluation, ...]


class Budgeted:
    """A velocity function (see `sampling.Velocity`) that runs `model` under a plan, for one sampling run.

    Each sigma is one evaluation; its first call is cond, the second uncond. Use as a context: leaving it ends the run.
    `velocity` and `backend`: how the model is run, where it needs more than its four inputs and plain layers.
    """

    def __init__(self, model: Flux, plan: Plan, method: Method, schedule: Sequence[float],
                 on_evaluation: Callable[[Evaluation], None] | None = None, velocity: Velocity | None = None,
                 backend: Backend = BACKEND) -> None:
        self.velocity, self.backend = velocity or model, backend
        self.model, self.recorder = model, Recorder(on_evaluation, next(model.parameters()).device)
        self.run = Run(plan, method, schedule, self.recorder)
        self.spent: Spent | None = None
        self._calls = 0

    def __enter__(self) -> Budgeted:
        return self

    def __exit__(self, *error: object) -> None:
        self.run.finish()
        self.spent = Spent(self.run.ledger.achieved, self.recorder.finish())

    def __call__(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        level = float(sigma[0])
        if level != self.run.sigma:
            self.run.arrive(level)
            self._calls = 0
        self._calls += 1
        rows, patch = x.shape[0], self.model.config.patch_size
        grid = x.shape[-2] // patch, x.shape[-1] // patch
        config = self.model.config
        geometry = Geometry(grid[0] * grid[1], context.shape[1], config.hidden_size, config.mlp_ratio)
        cond = rows if self._calls == 1 else 0
        branches = Branches((self._calls,), slice(0, cond), slice(cond, rows))
        with running(self.run, FAMILY, self.model, geometry, branches, rows, grid, self.backend), torch.no_grad():
            return self.velocity(x, sigma, context, pooled)
