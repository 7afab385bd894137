"""The demo's adapters: gates for the demo's base, trained, calibrated, checked and written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from ..checkpoints.adapter import save_adapter
from ..lora import load_lora, merge
from ..train.examples import Examples
from ..train.router import Recipe
from ..train.session import Job, begin, finish, plan
from ..train.teacher import flux_teacher
from .base import load_base
from .codec import CHANNELS
from .data import LATENT, Log, training_scene
from .gates import CHECKED_BUDGETS, check, publish, train_gates
from .heldout import held_out_prompts
from .prompt import encode_batch

PROMPTS, CHECKED_PROMPTS = 384, 4


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
    size = CHANNELS, LATENT, LATENT
    job = Job(kind.recipe, size, f"DyDiT demo: {kind.title}", kind.title, runs=PROMPTS // len(kind.recipe.counts), cfg=kind.cfg,
              jitter=0.0 if kind.twin else 0.45, seed=seed)
    train_gates(folder, job, model, flux_teacher, examples, processes, log)
    if kind.recipe.told:
        data = plan(job, teacher, examples, folder)
        run = begin(job, teacher, data, folder)
        for budget in CHECKED_BUDGETS:
            made = finish(run, job, teacher, data, budget=budget)
            save_adapter(folder / f"adapter@{budget:g}.safetensors", made)
        return
    check(teacher, publish(folder, target), encode_batch(held_out_prompts(CHECKED_PROMPTS)), size, kind.recipe.counts, log)


def demo_examples(prompts: int) -> Examples:
    """The first training captions."""
    return Examples(encode_batch([training_scene(index)[1][0] for index in range(prompts)]), encode_batch([""]))
