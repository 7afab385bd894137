"""The demo's adapters: gates for the demo's base, trained, calibrated, checked and written."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from ..budget import Plan
from ..checkpoints.adapter import Adapter, load_adapter, save_adapter
from ..lora import load_lora, merge
from ..methods import SUBSTITUTES
from ..models.flux import Flux
from ..runtime import Method
from ..sampling import sample, sigmas
from ..standalone import Budgeted
from ..storage import write_atomically
from ..train.examples import Examples
from ..train.router import Recipe, RouterRun, share, summary
from ..train.session import ADAPTER, Job, begin, claim, finish, plan, train
from ..train.teacher import flux_teacher
from ..train.team import Team, together
from .base import load_base
from .codec import CHANNELS
from .data import LATENT, Log, training_scene
from .heldout import held_out_prompts
from .prompt import encode_batch

PROMPTS = 384
CHECKED_BUDGETS, CHECKED_PROMPTS = (0.9, 0.75, 0.5), 4
TOLERANCE = 0.02


@dataclass(frozen=True)
class Kind:
    """An adapter of the demo in words, and how it is trained; `twin`: for the few-step twin."""

    title: str
    recipe: Recipe
    cfg: tuple[float, float] = (1.0, 3.0)
    twin: bool = False


def kinds(steps: int) -> dict[str, Kind]:
    """By the name in the file name; `steps` of training for the first, more for those that have more to learn."""
    wide = Recipe(steps, groups=16)
    # With reuse the first evaluation computes everything, so the others get less than the budget, most of all of 4 steps.
    reuse = Recipe(steps, batch=16, reuse=True, window=3, budgets=(0.4, 0.5, 0.6, 0.75, 0.9))
    low_rank = {"experts": 2, "rank": 3}
    four = replace(reuse, counts=(4,), budgets=(*reuse.budgets, 1.0), **low_rank)
    return {
        "sdt": Kind("tokens (SDT)", Recipe(steps)),
        "sdt_tdw": Kind("tokens and widths (SDT, TDW)", wide),
        "sdt_tdw_tdlora": Kind("tokens, widths and low-rank additions (SDT, TDW, TD-LoRA)",
                               replace(wide, steps=2 * steps, budgets=(*wide.budgets, 1.0), experts=2)),
        "reuse": Kind("tokens (SDT) that reuse", reuse, cfg=(1.0, 1.0)),
        "reuse_tdlora": Kind("tokens (SDT) that reuse, and low-rank additions (TD-LoRA)",
                             replace(reuse, budgets=(*reuse.budgets, 1.0), **low_rank), cfg=(1.0, 1.0)),
        "twin": Kind("tokens (SDT) that reuse, and low-rank additions (TD-LoRA), in 4 steps", four, cfg=(1.0, 1.0), twin=True),
    } | {f"reuse_{name}": Kind(f"tokens (SDT) that reuse, {words}", changed, cfg=(1.0, 1.0)) for name, words, changed in (
        # What one threshold for every budget is compared with (docs/quality.md); these do not ship.
        ("told", "told the budget", replace(reuse, told=True)),
        ("50", "for one budget, 0.5", replace(reuse, budgets=(0.5,))),
        ("75", "for one budget, 0.75", replace(reuse, budgets=(0.75,))),
    )}


def train_adapter(work: Path, base: Path, twin: Path, target: Path, name: str, kind: Kind, seed: int = 0, processes: int = 2,
                  log: Log = print) -> None:
    """Train, or continue, the gates in a folder of `work` for the model in `base`, with the LoRA in `twin` where the kind asks
    for it, and write the adapter to `target`."""
    model = load_base(base)
    if kind.twin:
        merge(model, load_lora(twin))
    teacher, examples, folder = flux_teacher(model), demo_examples(PROMPTS), work / f"adapter_{name}"
    job = Job(kind.recipe, (CHANNELS, LATENT, LATENT), f"DyDiT demo: {kind.title}", kind.title,
              runs=PROMPTS // len(kind.recipe.counts), cfg=kind.cfg, jitter=0.0 if kind.twin else 0.45, seed=seed)
    claim(folder, job, teacher, examples)
    data = plan(job, teacher, examples, folder)
    run = begin(job, teacher, data, folder)
    if run.step:
        log(f"continuing at step {run.step}")
    model.share_memory()
    share(run)
    together(_member, processes, sum(param.numel() for param in run.params), run, job, model, examples, folder, log)
    if kind.recipe.told:
        run = begin(job, teacher, data, folder)
        for budget in CHECKED_BUDGETS:
            made = finish(run, job, teacher, data, budget=budget)
            save_adapter(folder / f"adapter@{budget:g}.safetensors", made)
        return
    adapter = load_adapter(folder / ADAPTER)
    write_atomically(target, lambda partial: save_adapter(partial, adapter))
    check(model, adapter, kind.recipe.counts, log)


def demo_examples(prompts: int) -> Examples:
    """The first training captions."""
    return Examples(encode_batch([training_scene(index)[1][0] for index in range(prompts)]), encode_batch([""]))


def _member(team: Team, run: RouterRun, job: Job, model: Flux, examples: Examples, folder: Path, log: Log) -> None:
    # On CPUs without AMX the fused attention takes twice as long as plain bfloat16 matrix products.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    teacher, clock = flux_teacher(model), time.monotonic()

    def watch(run: RouterRun) -> None:
        nonlocal clock
        if run.step % 25 == 0 or run.step == job.recipe.steps:
            seconds, clock = time.monotonic() - clock, time.monotonic()
            log(f"step {run.step} {summary(run, job.recipe)} {seconds:.0f} s")

    train(run, job, teacher, plan(job, teacher, examples, folder), folder, watch, team=team)


def check(model: Flux, adapter: Adapter, counts: Sequence[int], log: Log) -> None:
    """Run held-out prompts at every checked budget; raises where the achieved budget is not the asked one."""
    method = Method(adapter.router, SUBSTITUTES[adapter.facts.substitutes[0]])
    context, pooled = encode_batch(held_out_prompts(CHECKED_PROMPTS))
    noise = torch.randn(CHECKED_PROMPTS, CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    for steps in counts:
        floor = 0.0
        for budget in (0.0, *CHECKED_BUDGETS):  # asked for nothing, it spends its floor
            with Budgeted(model, Plan(budget), method, sigmas(steps)) as budgeted:
                sample(budgeted, (context, pooled), noise, steps)
            kept = np.mean([evaluation.mask().mean((1, 2)) for evaluation in budgeted.spent.evaluations], axis=0)
            achieved = budgeted.spent.achieved
            floor = floor or achieved
            log(f"{steps} steps: asked {budget:g}, spent {achieved:.3f}, kept per block {' '.join(f'{part:.2f}' for part in kept)}")
            if abs(achieved - max(budget, floor)) > TOLERANCE:
                raise RuntimeError(f"The adapter spends {achieved:.3f} where {budget:g} was asked ({steps} steps).")
