"""A random FLUX of three blocks to train gates on, with fixtures; its products are in float32, so that numbers compare."""

from __future__ import annotations

import pytest
import torch

from dydit_core.models.flux import Flux, FluxConfig
from dydit_core.train.router import Recipe, RouterRun, new_router_run
from dydit_core.train.teacher import Teacher, flux_teacher
from dydit_core.train.trajectories import Trajectories, plan_runs, record

RECIPE = Recipe(steps=6, batch=16, budgets=(0.5, 0.7, 0.9), counts=(4,))


def random_flux(width: int, axes: tuple[int, ...]) -> Flux:
    """Random weights everywhere: a fresh FLUX would ignore its blocks, whose gates start at zero."""
    torch.manual_seed(0)
    model = Flux(FluxConfig(width, 1, 2, in_channels=2, context_in_dim=8, vec_in_dim=8, axes_dim=axes))
    with torch.no_grad():
        for param in model.parameters():
            param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model() -> Flux:
    return random_flux(64, (8, 12, 12))


@pytest.fixture(scope="module")
def teacher(model: Flux) -> Teacher:
    return flux_teacher(model, products=torch.float32)


@pytest.fixture(scope="module")
def data(teacher: Teacher) -> list[Trajectories]:
    """Guided runs of 4 steps."""
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randn(6, 3, 8, generator=generator), torch.randn(6, 8, generator=generator)
    noise = torch.randn(6, 2, 8, 8, generator=generator)
    plan = plan_runs(prompts, (torch.zeros(1, 3, 8), torch.zeros(1, 8)), noise, teacher.schedule(4), generator, (1.0, 3.0))
    record(teacher, plan)
    return [plan]


def fresh(teacher: Teacher, data: list[Trajectories], recipe: Recipe = RECIPE) -> RouterRun:
    return new_router_run(teacher, data, recipe, rank=4)
