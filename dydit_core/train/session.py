"""One training from prompts to an adapter, in a folder that it can be continued from: the shell and the node run this."""

from __future__ import annotations

import copy
import hashlib
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoints.adapter import Adapter, Facts, save_adapter
from ..checkpoints.files import bad
from ..checkpoints.fit import layout_of, sketch
from ..storage import write_atomically
from .calibrate import calibrate
from .examples import Examples
from .router import Diverged, Recipe, RouterRun, load, new_router_run, save, train_step
from .teacher import Teacher
from .team import Team
from .told import ScoresAt
from .trajectories import Trajectories, plan_runs, record

# The budget whose shift the gates stand at while the capacity table is made.
MIDDLE = 0.7
# Steps between two points of the curve of errors.
CURVE_EVERY = 5
# Numbers of each weight by which a base is known.
SAMPLED = 64
CHECKPOINT, ADAPTER, JOB = "training.pt", "adapter.safetensors", "job.json"


@dataclass(frozen=True)
class Job:
    """`runs` dense runs of each of the recipe's step counts are learned from, of a picture of latent `size` (C, H, W) or a video of (C, frames, H, W), with
    guidance drawn from the range `cfg` (1, 1: none); `jitter` moves their sigmas (see `plan_runs`). `kind` says in words what
    is trained, and `title` is the adapter's name. `taught`: how the base is run beside its weights (its guidance, the shift of its
    sigmas, …), by name; a folder goes on with the same alone."""

    recipe: Recipe
    size: tuple[int, ...]
    title: str
    kind: str
    runs: int = 96
    cfg: tuple[float, float] = (1.0, 1.0)
    jitter: float = 0.45
    seed: int = 0
    license: str = ""
    taught: Mapping[str, str | float] = field(default_factory=dict)


class OtherRun(ValueError):
    """The folder holds another training; the message says what differs and what to do."""

    def __init__(self, folder: Path, different: list[str]) -> None:
        super().__init__(f"{folder} holds another training (it differs in: {', '.join(different)}); choose another folder, or "
                         "delete this one to begin anew.")
        self.different = different


def claim(folder: Path, job: Job, teacher: Teacher, examples: Examples) -> None:
    """Make `folder` the one of this job, or raise OtherRun where it is another's, FileError where it is nobody's. The number of
    steps may have changed, and how many rows are in memory at once."""
    mine = json.loads(json.dumps({**asdict(replace(job, title="", license="")), "base": _base_digest(teacher.model),
                                  "prompts": _digest(examples)}))
    path = folder / JOB
    if path.exists():
        try:
            flat_mine, flat_theirs = (_flat(part) for part in (mine, json.loads(path.read_text())))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise bad(path, "is not of a DyDiT training", "choose another folder") from None
        different = [key for key in flat_mine if flat_mine[key] != flat_theirs.get(key)]
        if different:
            raise OtherRun(folder, different)
    write_atomically(path, lambda partial: partial.write_text(json.dumps(mine, indent=1)))


def _flat(job: Mapping[str, Any]) -> dict[str, Any]:
    """What a training that is gone on with must have in common with the one that was begun."""
    parts = {**job, **job["recipe"], **job["taught"]}
    return {key: value for key, value in parts.items() if key not in ("recipe", "taught", "steps", "group")}


def _base_digest(model: nn.Module) -> str:
    """Of some numbers of every weight: fine-tunes may share all small tensors."""
    digest = hashlib.sha256()
    for name, param in model.named_parameters():
        flat = param.detach().flatten()
        some = flat[:: max(1, flat.numel() // SAMPLED)].float().cpu().contiguous()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()[:16]


def _digest(examples: Examples) -> str:
    digest = hashlib.sha256()
    for part in (*examples.conditioning, *([] if examples.latents is None else [examples.latents])):
        digest.update(part.float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def plan(job: Job, teacher: Teacher, examples: Examples, folder: Path | None) -> list[Trajectories]:
    """The dense runs still to be made, or those that are in `folder`."""
    generator = torch.Generator().manual_seed(job.seed)
    plans = []
    for place, count in enumerate(job.recipe.counts):
        index = (place * job.runs + torch.arange(job.runs)) % len(examples)
        latents = None if examples.latents is None else examples.latents[index]
        noise = torch.randn(job.runs, *job.size, generator=generator)
        plans.append(plan_runs(examples.given(index), examples.empty, noise, teacher.schedule(count), generator, job.cfg,
                               job.jitter, None if folder is None else folder / "runs", latents))
    return plans


def begin(job: Job, teacher: Teacher, data: list[Trajectories], folder: Path) -> RouterRun:
    """As it was left in `folder`, or from the start."""
    run = new_router_run(teacher, data, job.recipe, seed=job.seed)
    if (folder / CHECKPOINT).exists():
        try:
            load(run, folder / CHECKPOINT)
        except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, ValueError):
            raise bad(folder / CHECKPOINT, "is damaged, or of another version of this pack",
                      "delete it to begin anew with the dense runs that are there") from None
    return run


def train(run: RouterRun, job: Job, teacher: Teacher, data: list[Trajectories], folder: Path, watch: Callable[[RouterRun], None],
          save_every: int = 100, team: Team = Team(), recorded: Callable[[], None] = lambda: None) -> None:
    """Make the dense runs that are missing and take the steps that `run` has not taken.

    `recorded` is called after a few dense runs by whoever made them, `watch` by the leader after every step. Whatever ends the
    training, what is trained by then is saved, unless that is half a step or the last one went wrong.
    """
    for runs in data:
        record(teacher, runs, team=team, told=recorded)
    try:
        while run.step < job.recipe.steps:
            train_step(run, teacher, data, job.recipe, team)
            if team.leads:
                if run.step % CURVE_EVERY == 0:
                    run.curve.append((run.step, run.gauge[:, 1].tolist()))
                if run.step % save_every == 0 and run.step < job.recipe.steps:
                    keep(run, job, teacher, data, folder, samples=64)
                watch(run)
    except BaseException as error:
        if team.leads and 0 < run.step == len(run.losses) and not isinstance(error, Diverged):
            save(run, folder / CHECKPOINT)
        raise
    if team.leads:
        keep(run, job, teacher, data, folder)


def keep(run: RouterRun, job: Job, teacher: Teacher, data: list[Trajectories], folder: Path, samples: int = 512) -> Adapter:
    """Write the checkpoint and, calibrated on `samples` evaluations, the adapter of what is trained by now."""
    adapter = finish(run, job, teacher, data, samples)
    if not adapter.finite:
        raise Diverged(f"The gates hold numbers that are not finite after {run.step} steps; train with a lower rate (now {job.recipe.rate:g}).")
    save(run, folder / CHECKPOINT)
    write_atomically(folder / ADAPTER, lambda partial: save_adapter(partial, adapter))
    return adapter


def finish(run: RouterRun, job: Job, teacher: Teacher, data: list[Trajectories], samples: int = 512,
           budget: float = MIDDLE) -> Adapter:
    """The adapter of what is trained by now, on the CPU, calibrated around `budget`; `run` can go on. Of gates that are told
    the budget it is an adapter for that one alone."""
    recipe = job.recipe
    # At a budget of 1 every gate is open, and no shift was learned.
    level = min(range(len(recipe.budgets)), key=lambda level: (recipe.budgets[level] >= 1, abs(recipe.budgets[level] - budget)))
    gates = run.gates.at(level)
    table = calibrate(teacher, gates, data, recipe, run.shifts[level].item(), samples) if gates.tokens is not None else None
    layout = layout_of(teacher.model, teacher.family.sizes(teacher.model)[0])
    facts = Facts(
        kind=layout.kind,
        double=layout.double,
        single=layout.single,
        width=layout.width,
        title=job.title,
        substitutes=("reuse",) if recipe.reuse else ("nothing",),
        budgets=tuple(budget for budget in recipe.budgets if budget < 1),
        base=sketch(teacher.model),
        training={"steps": run.step, "batch": recipe.batch, "seed": run.seed, "sampling_steps": list(recipe.counts),
                  "window": recipe.window, "error_db": _errors(run, recipe)},
        description=f"DyDiT adapter: {job.kind}, trained from scratch on the frozen base with {'reuse' if recipe.reuse else 'nothing'} "
                    "in place of what is skipped.",
        license=job.license,
        date=date.today().isoformat(),
    )
    tokens = gates.tokens.alone() if isinstance(gates.tokens, ScoresAt) else gates.tokens
    tokens, width, low_rank = (None if part is None else _frozen(part) for part in (tokens, gates.width, gates.low_rank))
    return Adapter(facts, tokens, table, width, low_rank)


def _frozen(part: nn.Module) -> nn.Module:
    """A copy: the original is trained on."""
    return copy.deepcopy(part).cpu().requires_grad_(False)


def _errors(run: RouterRun, recipe: Recipe) -> dict[str, float]:
    """In dB, of the budgets that were trained by now."""
    return {f"{budget:g}": round(error, 2) for budget, (cost, error) in zip(recipe.budgets, run.gauge.tolist()) if cost}
