"""The demo's adapters: gates for the demo's base, trained, calibrated, checked and written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import numpy as np
import torch

from ..budget import Plan
from ..checkpoints.adapter import Adapter, Facts, save_adapter
from ..checkpoints.fit import sketch
from ..models.flux import Flux
from ..methods import substitute_for
from ..runtime import Method
from ..standalone import Budgeted
from ..storage import write_atomically
from ..train.calibrate import calibrate
from ..train.router import Recipe, RouterRun, load, new_router_run, share, train_router
from ..train.teacher import flux_teacher
from ..train.team import Team, together
from ..train.trajectories import Trajectories, plan_runs, record
from .base import load_base
from .codec import CHANNELS
from .data import LATENT, Log, training_scene
from .heldout import held_out_prompts
from .prompt import encode_batch
from ..sampling import sample, sigmas

PROMPTS = 96  # for each number of steps
MIDDLE = 0.7
CHECKED_BUDGETS, CHECKED_STEPS, CHECKED_PROMPTS = (0.9, 0.75, 0.5), (4, 8, 20), 4
TOLERANCE = 0.02


@dataclass(frozen=True)
class Kind:
    """What an adapter of the demo has, in words and in its recipe."""

    title: str
    recipe: Recipe


def kinds(steps: int) -> dict[str, Kind]:
    """By the name in the file name; `steps` of training for the first, more for those that have more to learn."""
    wide = Recipe(steps, groups=16)
    return {
        "sdt": Kind("tokens (SDT)", Recipe(steps)),
        "reuse": Kind("tokens that reuse (SDT)", Recipe(steps, reuse=True, window=3)),
        "sdt_tdw": Kind("tokens and widths (SDT, TDW)", wide),
        "sdt_tdw_tdlora": Kind("tokens, widths and low-rank additions (SDT, TDW, TD-LoRA)",
                               replace(wide, steps=2 * steps, experts=2, budgets=(*wide.budgets, 1.0))),
    }


def train_adapter(work: Path, base: Path, target: Path, name: str, kind: Kind, seed: int = 0, processes: int = 2,
                  log: Log = print) -> None:
    """Train, or continue, the gates in `work` for the model in `base`, and write the adapter to `target`."""
    recipe = kind.recipe
    model = load_base(base)
    data = training_runs(recipe.counts, seed)
    run = new_router_run(flux_teacher(model), data, recipe, seed=seed)
    checkpoint = work / f"{name}.pt"
    if checkpoint.exists():
        load(run, checkpoint)
        log(f"continuing at step {run.step}")
    for runs in data:
        runs.share()
    model.share_memory()
    share(run)
    numbers = sum(param.numel() for param in run.params)
    together(_member, processes, numbers, run, model, data, recipe, checkpoint, log)
    load(run, checkpoint)
    adapter = finish(run, model, data, kind)
    write_atomically(target, lambda partial: save_adapter(partial, adapter))
    check(model, adapter, log)


def training_runs(counts: Sequence[int], seed: int, prompts: int = PROMPTS) -> list[Trajectories]:
    """Sampling runs still to be made, `prompts` of each number of steps, for the first training captions."""
    generator = torch.Generator().manual_seed(seed)
    plans = []
    for place, count in enumerate(counts):
        captions = [training_scene(place * prompts + index)[1][0] for index in range(prompts)]
        noise = torch.randn(prompts, CHANNELS, LATENT, LATENT, generator=generator)
        plans.append(plan_runs(encode_batch(captions), encode_batch([""]), noise, sigmas(count), generator))
    return plans


def _member(team: Team, run: RouterRun, model: Flux, data: Sequence[Trajectories], recipe: Recipe, checkpoint: Path,
            log: Log) -> None:
    # On CPUs without AMX the fused attention takes twice as long as plain bfloat16 matrix products.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    teacher = flux_teacher(model)
    for runs in data:
        record(teacher, runs, team=team)
        if team.leads:
            log(f"{len(runs.x)} dense runs of {runs.steps} steps are made")
    train_router(run, teacher, data, recipe, checkpoint, log, team=team)


def finish(run: RouterRun, model: Flux, data: Sequence[Trajectories], kind: Kind) -> Adapter:
    """Calibrate what was trained and say where it came from."""
    recipe, gates = kind.recipe, run.gates.requires_grad_(False)
    middle = min(range(len(recipe.budgets)), key=lambda level: abs(recipe.budgets[level] - MIDDLE))
    table = calibrate(flux_teacher(model), gates, data, recipe, run.shifts[middle].item()) if gates.tokens is not None else None
    errors = {f"{budget:g}": round(float(error), 2) for budget, error in zip(recipe.budgets, run.gauge[:, 1])}
    facts = Facts(
        double=len(model.double_blocks),
        single=len(model.single_blocks),
        width=model.config.hidden_size,
        title=f"DyDiT demo: {kind.title}",
        substitutes=("reuse",) if recipe.reuse else ("nothing",),
        budgets=CHECKED_BUDGETS,
        base=sketch(model),
        training={"steps": run.step, "batch": recipe.batch, "seed": run.seed, "velocity_error_db": errors},
        description=f"Learned {kind.title} for the demo model of DyDiT for ComfyUI, trained on drawn scenes.",
        date=date.today().isoformat(),
    )
    return Adapter(facts, gates.tokens, table, gates.width, gates.low_rank)


def check(model: Flux, adapter: Adapter, log: Log) -> None:
    """Run held-out prompts at every checked budget; raises where the achieved budget is not the asked one."""
    substitute = adapter.facts.substitutes[0]
    method = Method(adapter.router, substitute_for(adapter.router, substitute))
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
