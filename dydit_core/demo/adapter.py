"""The demo's adapter: a token router for the demo's base, trained, calibrated, checked and written."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import numpy as np
import torch

from ..budget import Plan
from ..checkpoints.adapter import Adapter, Facts, save_adapter, sketch
from ..models.flux import Flux
from ..routers.learned import LearnedRouter
from ..runtime import Method
from ..standalone import Budgeted
from ..substitutes.nothing import Nothing
from ..train.calibrate import calibrate
from ..train.router import Recipe, RouterRun, load, new_router_run, share, train_router
from ..train.storage import write_atomically
from ..train.team import Team, together
from ..train.trajectories import Trajectories, plan_runs, record
from .base import load_base
from .codec import CHANNELS
from .data import LATENT, Log, training_scene
from .heldout import held_out_prompts
from .prompt import encode_batch
from .sampling import sample, sigmas

CHECKPOINT = "router.pt"
PROMPTS, STEPS = 96, 20
MIDDLE = 0.7
CHECKED_BUDGETS, CHECKED_STEPS, CHECKED_PROMPTS = (0.9, 0.75, 0.5), (4, 8, 20), 4
TOLERANCE = 0.02


def train_adapter(work: Path, base: Path, target: Path, recipe: Recipe, seed: int = 0, processes: int = 2,
                  log: Log = print) -> None:
    """Train, or continue, the router in `work` for the model in `base`, and write the adapter to `target`."""
    model = load_base(base)
    data = training_runs(seed)
    run = new_router_run(model, data, recipe, seed=seed)
    checkpoint = work / CHECKPOINT
    if checkpoint.exists():
        load(run, checkpoint)
        log(f"continuing at step {run.step}")
    data.share()
    model.share_memory()
    share(run)
    numbers = sum(param.numel() for param in run.params)
    together(_member, processes, numbers, run, model, data, recipe, checkpoint, log)
    load(run, checkpoint)
    adapter = finish(run, model, data, recipe, log)
    write_atomically(target, lambda partial: save_adapter(partial, adapter))
    check(model, adapter, log)


def training_runs(seed: int, prompts: int = PROMPTS) -> Trajectories:
    """Sampling runs still to be made, for the first training captions."""
    generator = torch.Generator().manual_seed(seed)
    captions = [training_scene(index)[1][0] for index in range(prompts)]
    noise = torch.randn(prompts, CHANNELS, LATENT, LATENT, generator=generator)
    return plan_runs(encode_batch(captions), encode_batch([""]), noise, STEPS, generator)


def _member(team: Team, run: RouterRun, model: Flux, data: Trajectories, recipe: Recipe, checkpoint: Path,
            log: Log) -> None:
    # On CPUs without AMX the fused attention takes twice as long as plain bfloat16 matrix products.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    record(model, data, team=team)
    if team.leads:
        log(f"{len(data.x)} dense runs of {STEPS} steps are made")
    train_router(run, model, data, recipe, checkpoint, log, team=team)


def finish(run: RouterRun, model: Flux, data: Trajectories, recipe: Recipe, log: Log) -> Adapter:
    """Calibrate what was trained and say where it came from."""
    middle = min(range(len(recipe.budgets)), key=lambda level: abs(recipe.budgets[level] - MIDDLE))
    table = calibrate(model, run.scores, data, run.shifts[middle].item())
    errors = {f"{budget:g}": round(float(error), 2) for budget, error in zip(recipe.budgets, run.gauge[:, 1])}
    facts = Facts(
        double=len(model.double_blocks),
        single=len(model.single_blocks),
        title="DyDiT demo token router",
        substitutes=("reuse",) if recipe.stale else ("nothing",),
        budgets=CHECKED_BUDGETS,
        base=sketch(model),
        training={"steps": run.step, "batch": recipe.batch, "seed": run.seed, "velocity_error_db": errors},
        description="Learned token router (DyDiT SDT) for the demo model of DyDiT for ComfyUI, trained on drawn scenes.",
        date=date.today().isoformat(),
    )
    return Adapter(run.scores.requires_grad_(False), table, facts)


def check(model: Flux, adapter: Adapter, log: Log) -> None:
    """Run held-out prompts at every checked budget; raises where the achieved budget is not the asked one."""
    method = Method(LearnedRouter(adapter.scores, adapter.table), Nothing())
    context, pooled = encode_batch(held_out_prompts(CHECKED_PROMPTS))
    noise = torch.randn(CHECKED_PROMPTS, CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    for steps in CHECKED_STEPS:
        for budget in CHECKED_BUDGETS:
            with Budgeted(model, Plan(budget), method, sigmas(steps)) as budgeted:
                sample(budgeted, context, pooled, noise, steps)
            kept = np.mean([evaluation.mask().mean((1, 2)) for evaluation in budgeted.spent.evaluations], axis=0)
            achieved = budgeted.spent.achieved
            log(f"{steps} steps: asked {budget:g}, spent {achieved:.3f}, kept per block {' '.join(f'{part:.2f}' for part in kept)}")
            if abs(achieved - budget) > TOLERANCE:
                raise RuntimeError(f"The adapter spends {achieved:.3f} where {budget:g} was asked ({steps} steps).")
