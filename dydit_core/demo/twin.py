"""The demo's few-step twin: a LoRA with which the base draws in 4 steps what it otherwise draws in 20.

The teacher is the base at cfg 1. A guided one would take twice as long and draw some things twice (a second sun), and the
base follows its prompts without guidance; what it loses in few steps is what the noise decides: clouds, stars, hills.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..compare import psnr
from ..lora import save_lora
from ..models.flux import Flux
from ..storage import write_atomically
from ..train.fewstep import FewStepRun, Paths, Recipe, new_few_step_run, train
from ..train.resume import resume
from ..train.team import Team, together
from .base import load_base, use_bfloat16
from .codec import CHANNELS
from .data import LATENT, Log, training_scene
from .heldout import held_out_prompts
from .preview import pictures
from .prompt import encode_batch
from ..sampling import Velocity, sample, sigmas
from .vae import Decoder, load_decoder

STEPS, TEACHER_STEPS = 4, 20
# Runs in one file on disk: an interruption loses no more.
PART = 16
# Far from the seeds of the noises that held-out prompts start from. (torch takes the low 32 bits of a seed.)
FIRST_NOISE = 1 << 31
EXAMINED = 16


def train_twin(work: Path, base: Path, vae: Path, target: Path, recipe: Recipe, runs: int, seed: int = 0,
               processes: int = 2, log: Log = print) -> None:
    """Train, or continue, the twin of the model in `base` on the first `runs` runs of it, and write it to `target`.

    Everything on the way is in a folder of `work` that belongs to this base.
    """
    folder = work / f"twin_{hashlib.sha256(base.read_bytes()).hexdigest()[:8]}"
    checkpoint = folder / f"seed{seed}.pt"
    model = load_base(base)
    run = new_few_step_run(model, recipe, checkpoint, seed)
    if run.step:
        log(f"continuing at step {run.step}")
    model.share_memory()
    numbers = sum(param.numel() for param in run.params)
    together(_member, processes, numbers, run, model, folder, recipe, runs, checkpoint, vae, log)
    resume(checkpoint, run.lora, run.optimizer)
    save_lora(target, run.lora, facts(recipe, runs))


def facts(recipe: Recipe, runs: int) -> dict[str, str]:
    """What the file says of itself."""
    return {
        "modelspec.title": f"DyDiT demo in {STEPS} steps",
        "modelspec.description": f"LoRA for the demo model of DyDiT for ComfyUI: {STEPS} Euler steps of the simple schedule at "
                                 f"cfg 1 and strength 1 draw what the model draws in {TEACHER_STEPS}.",
        "training": f"{recipe.steps} steps of {recipe.batch} of {runs} runs, rank {recipe.rank}",
    }


def _member(team: Team, run: FewStepRun, model: Flux, folder: Path, recipe: Recipe, runs: int, checkpoint: Path,
            vae: Path, log: Log) -> None:
    use_bfloat16(model)
    record_paths(model, folder, runs, team, log)
    paths = load_paths(folder, runs)
    examine = _examiner(model, load_decoder(vae))
    if team.leads:
        log(f"{len(paths.x)} runs of {TEACHER_STEPS} steps are made; the base in {STEPS} steps: {examine()}")
    with run.lora.beside(model):
        train(run, model, paths, recipe, checkpoint, examine, log, team=team)


def _examiner(model: Flux, decoder: Decoder) -> Callable[[], str]:
    """Says how near pictures in few steps are to those in many that `model` draws now, on held-out prompts."""
    prompts = held_out_prompts(EXAMINED)
    teacher = pictures(model, decoder, prompts, TEACHER_STEPS)
    return lambda: f"held out {psnr(pictures(model, decoder, prompts, STEPS), teacher):.2f} dB"


def record_paths(model: Velocity, folder: Path, runs: int, team: Team = Team(), log: Log = print) -> None:
    """Make what `folder` lacks of the first `runs` runs, in whole parts; each member of a team makes its share."""
    for part in _parts(runs)[team.rank :: team.size]:
        path = _part_file(folder, part)
        if path.exists():
            continue
        points = teacher_points(model, *_started(part))
        write_atomically(path, lambda partial: torch.save(points, partial))
        if part % 16 == 0:
            log(f"runs {(part + 1) * PART} / {runs}")
    team.wait()


def load_paths(folder: Path, runs: int) -> Paths:
    """The recorded runs: the first `runs`, in whole parts."""
    points = torch.cat([torch.load(_part_file(folder, part), weights_only=True) for part in _parts(runs)])
    contexts, pooled, _ = zip(*(_started(part) for part in _parts(runs)))
    return Paths(points, torch.tensor(sigmas(STEPS)), torch.cat(contexts), torch.cat(pooled))


def teacher_points(model: Velocity, context: Tensor, pooled: Tensor, noise: Tensor) -> Tensor:
    """Where the teacher is at the student's sigmas: [rows, STEPS + 1, C, H, W] in half precision."""
    points = []

    def watched(x: Tensor, *rest: Tensor) -> Tensor:
        points.append(x)
        return model(x, *rest)

    end = sample(watched, (context, pooled), noise, TEACHER_STEPS)
    return torch.stack([*points[:: TEACHER_STEPS // STEPS], end], dim=1).half()


def _parts(runs: int) -> range:
    return range(-(-runs // PART))


def _part_file(folder: Path, part: int) -> Path:
    return folder / f"paths{TEACHER_STEPS}" / f"{part:05d}.pt"


def _started(part: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts (context, pooled) and noise of the runs of one part."""
    numbers = range(part * PART, (part + 1) * PART)
    context, pooled = encode_batch([training_scene(number)[1][0] for number in numbers])
    noise = [torch.randn(CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(FIRST_NOISE + number))
             for number in numbers]
    return context, pooled, torch.stack(noise)
