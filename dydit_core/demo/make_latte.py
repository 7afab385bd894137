"""Make the small Latte of drawn videos and its adapter from nothing: `python -m dydit_core.demo.make_latte --work DIR [STAGE …]`.

It shares the VAE of the small DiT and SiT, which the stage vae of make_dit makes. Every stage skips what is already done, so
the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..checkpoints.adapter import load_adapter
from ..checkpoints.files import bad
from ..methods import as_trained
from ..train.settings import read_settings
from ..train.subject import prepare
from ..train.teacher import dit_teacher
from .class_data import FRESH, VIDEOS, ClassData, encode, load_class_data
from .class_model import by_class, export, load_class_model
from .files import CLASS_VAE_FILE, LATTE_ADAPTER_FILE, LATTE_FILE
from .gates import CHECKED_BUDGETS, check, publish, train_gates
from .latte import LATTE, SCENES, decode_videos, dense, fresh
from .motion import moves_as_said
from .moving import FRAMES, NAMES
from .phase import train_phase
from .preview import sheet
from .stages import Stages, command, log, run
from .vae import load_decoder, load_learned_encoder

TITLE = "DyDiT demo: a small Latte of drawn videos, by class"
# With reuse the first evaluation computes everything, so the others get less than the budget.
BUDGETS, COUNTS, GUIDANCE = [0.4, *sorted(CHECKED_BUDGETS)], [8, 20], [1.0, 3.0]


def _vae(args: argparse.Namespace) -> Path:
    path = args.weights / CLASS_VAE_FILE
    if not path.exists():
        raise bad(path, "is not there", "make it: python -m dydit_core.demo.make_dit vae, or give --weights its folder")
    return path


def _data(args: argparse.Namespace) -> ClassData:
    return load_class_data(args.work, _vae(args), SCENES, log, VIDEOS)


def make_data(args: argparse.Namespace) -> None:
    """Draw and encode the training videos; see that the measure of motion sees what was drawn, also through the VAE."""
    _data(args)
    count = args.each * len(NAMES)
    frames, labels = VIDEOS.drawn(FRESH, FRESH + count), torch.tensor([VIDEOS.scene(FRESH + index)[1] for index in range(count)])
    _judge("drawn", frames, labels, args.work)
    path = _vae(args)
    with torch.no_grad():
        _judge("drawn_vae", decode_videos(encode(frames, load_learned_encoder(path)), load_decoder(path)), labels, args.work)


def make_latte(args: argparse.Namespace) -> None:
    phase = dense(_data(args), args.full, args.settle)
    train_phase(args.work, fresh(args.seed), phase, args.seed, args.processes, log)
    export(args.work / phase.checkpoint, LATTE, NAMES, args.weights / LATTE_FILE, TITLE)


def make_adapter(args: argparse.Namespace) -> None:
    """What the train command makes of the same settings, by several processes; then its budgets are checked."""
    base, folder = args.weights / LATTE_FILE, args.work / "adapter"
    settings = read_settings({"base": str(base), "work": str(folder), "kind": "tokens", "substitute": "reuse", "budgets": BUDGETS,
                              "sampling_steps": COUNTS, "steps": args.adapter, "batch": 16, "cfg": GUIDANCE, "group": 4, "window": 3, "runs": args.runs,
                              "checkpointing": False, "device": "cpu", "seed": args.seed, "title": f"{TITLE}: tokens that reuse"}, None)
    subject = prepare(settings, torch.device("cpu"))
    train_gates(folder, subject.job, subject.teacher.model, dit_teacher, subject.examples, args.processes, log)
    adapter = publish(folder, args.weights / LATTE_ADAPTER_FILE)
    check(subject.teacher, adapter, (torch.arange(len(NAMES)),), LATTE.latent_size, COUNTS, log)


def make_measure(args: argparse.Namespace) -> None:
    """Draw every class, see which way things move, and leave sheets for eyes: dense, then under the budgets of the adapter."""
    decoder, drawn = load_decoder(_vae(args)), load_class_model(args.weights / LATTE_FILE)
    labels, path = torch.arange(len(NAMES)).repeat_interleave(args.each), args.weights / LATTE_ADAPTER_FILE
    for cfg in args.cfg:
        _judge(f"dense_cfg{cfg:g}", decode_videos(drawn.draw(labels, args.steps, cfg, args.seed)[0], decoder), labels, args.work)
    if path.exists():
        method = as_trained(load_adapter(path).router)
        for budget in CHECKED_BUDGETS:
            latents, spent = drawn.draw(labels, args.steps, args.cfg[-1], args.seed, method, budget)
            _judge(f"adapter_{budget:g}", decode_videos(latents, decoder), labels, args.work, f", spent {spent:.3f}")


def _judge(name: str, frames: Tensor, labels: Tensor, work: Path, more: str = "") -> None:
    """Log the share of videos whose things go the way their class says, and leave a sheet: a video in each row."""
    right = moves_as_said(frames, labels).float()
    log(f"{name}: {100 * right.mean():.1f} % move as said ({by_class(right, labels, NAMES)}){more}")
    sheet(F.pad(frames.flatten(0, 1), (0, 4, 0, 4), value=1.0), FRAMES).save(work / f"{name}.png")


STAGES: Stages = {"data": make_data, "latte": make_latte, "adapter": make_adapter, "measure": make_measure}


def main(argv: Sequence[str] | None = None) -> None:
    parser = command("make_latte", __doc__, STAGES, Path.home() / "dydit_work" / "latte")
    parser.add_argument("--full", type=int, default=2700, help="training steps of the Latte")
    parser.add_argument("--settle", type=int, default=900, help="training steps of the Latte with falling learning rate")
    parser.add_argument("--adapter", type=int, default=200, help="training steps of the adapter")
    parser.add_argument("--runs", type=int, default=64, help="dense runs that the adapter learns from, of each number of steps")
    parser.add_argument("--each", type=int, default=4, help="videos of each class to measure on")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps to measure with")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0], help="guidance scales to measure at; the adapter at the last")
    run(parser, STAGES, argv)


if __name__ == "__main__":
    main()
