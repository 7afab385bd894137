"""`train`: an adapter for the demo, for any FLUX in ComfyUI's layout, or for a DiT, SiT or Latte; from prompts, classes or pictures.

The base stays as it is and is its own teacher: gates learn to skip what hardly shows. The folder --work holds everything,
and the same command goes on from it after any interruption. Several processes or GPUs: start it with accelerate launch.
All settings may stand in a TOML file, under the names of the flags; docs/train.md explains them, --dry-run says what they
cost.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..checkpoints.adapter import load_adapter, save_adapter
from ..storage import write_atomically
from .estimate import estimate
from .preview import sample_sheet
from .processes import join
from .session import ADAPTER, begin, claim, plan, train
from .settings import Settings, add_flags, read_settings
from .subject import Subject, prepare
from .team import Team
from .troubles import sentence, stopped_once
from .watch import Watch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("settings", nargs="?", type=Path, help="a TOML file of settings; flags count more")
    parser.add_argument("--dry-run", action="store_true", help="measure one block, print what the whole run takes, and end")
    add_flags(parser)


def run(args: argparse.Namespace) -> None:
    given = {name: value for name, value in vars(args).items() if name not in ("settings", "dry_run", "run")}
    leads, work = os.environ.get("RANK", "0") == "0", Path(given.get("work", "dydit_training"))
    try:
        settings = read_settings(given, args.settings)
        work = settings.work
        with stopped_once():
            estimate(settings, print) if args.dry_run else train_adapter(settings)
    except BaseException as error:
        told = sentence(error, work)
        if told is None and leads:
            raise
        # What the leader runs into, the others do too; and when it ends, so do they.
        raise SystemExit(told if leads else 1) from None


def train_adapter(settings: Settings, log: Callable[[str], None] = lambda line: print(line, flush=True)) -> None:
    """Raises what `troubles.sentence` has words for."""
    team, device = join(settings.device)
    subject = prepare(settings, device)
    teacher, job, folder = subject.teacher, subject.job, settings.work
    if team.leads:
        if settings.out is not None:  # a night later would be late to find out
            settings.out.parent.mkdir(parents=True, exist_ok=True)
        claim(folder, job, teacher, subject.examples)
    team.wait()
    data = plan(job, teacher, subject.examples, folder)
    run = begin(job, teacher, data, folder)

    def sheet() -> Image.Image:
        return sample_sheet(teacher, job, subject.examples, load_adapter(folder / ADAPTER), subject.painter, subject.note)

    tell = log if team.leads else lambda line: None
    watch = Watch(job, data, folder, settings.save_every, settings.grid_every, sheet, tell)
    tell(_opening(settings, subject, run.step, team))
    with _attention(settings, device):
        train(run, job, teacher, data, folder, watch, settings.save_every, team, watch.recorded)
        if team.leads:
            watch.draw(run)
            watch.draw_sheet(run)
            tell(_closing(settings, folder / ADAPTER))
    team.leave()


def _attention(settings: Settings, device: torch.device) -> AbstractContextManager[None]:
    # On CPUs without AMX the fused attention of so small a model takes twice as long as plain bfloat16 matrix products.
    return sdpa_kernel(SDPBackend.MATH) if settings.demo and device.type == "cpu" else nullcontext()


def _opening(settings: Settings, subject: Subject, step: int, team: Team) -> str:
    job, device = subject.job, subject.teacher.device
    members = f", {team.size} processes" if team.size > 1 else ""
    runs = job.runs * len(job.recipe.counts)
    begun = f"continuing at step {step}" if step else f"{len(subject.examples)} {subject.things}, {runs} dense runs first"
    return f"{job.title}; {job.recipe.steps} steps on {device}{members}, in {settings.work}; {begun}"


def _closing(settings: Settings, made: Path) -> str:
    if settings.out is None:
        return f"Done: {made}. Put it in ComfyUI/models/dydit and load it with DyDiT Adapter Loader."
    adapter = load_adapter(made)
    write_atomically(settings.out, lambda partial: save_adapter(partial, adapter))
    return f"Done: {settings.out}. Load it with DyDiT Adapter Loader."
