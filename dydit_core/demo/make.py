"""Make the demo model from nothing: `python -m dydit_core.demo.make --work DIR [STAGE …]`.

Every stage skips what is already done, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..compare import psnr
from ..lora import load_lora, merge
from ..train.fewstep import Recipe
from .adapter import kinds, train_adapter
from .base import CHECKPOINT, export_base, load_base, stages, train_base, use_bfloat16
from .checker import accuracy, export_checker, fresh_scenes, load_checker, train_checker
from .data import draw, load_codec
from .decoder import train_decoder
from .files import BASE_FILE, CHECKER_FILE, TWIN_FILE, VAE_FILE, adapter_file
from .heldout import held_out, held_out_prompts
from .preview import pictures, sheet
from .stages import Stages, command, log, run
from .twin import STEPS, TEACHER_STEPS, train_twin
from .vae import export_vae, load_decoder


def make_base(args: argparse.Namespace) -> None:
    train_base(args.work, stages(args.windows, args.full, args.settle), args.seed, args.processes, not args.eager, log)


def make_vae(args: argparse.Namespace) -> None:
    decoder = train_decoder(args.work, args.decoder, args.seed, log)
    export_vae(load_codec(args.work, log), decoder, args.weights / VAE_FILE)


def make_checker(args: argparse.Namespace) -> None:
    decoder = train_decoder(args.work, args.decoder, args.seed, log)
    export_checker(train_checker(args.work, decoder, args.checker, args.seed, log), args.weights / CHECKER_FILE)


def make_export(args: argparse.Namespace) -> None:
    export_base(args.work / CHECKPOINT, args.weights / BASE_FILE)


def make_adapter(args: argparse.Namespace) -> None:
    for name in args.kinds:
        train_adapter(args.work, args.weights / BASE_FILE, args.weights / TWIN_FILE, args.weights / adapter_file(name), name,
                      kinds(args.router)[name], args.seed, args.processes, log)


def make_twin(args: argparse.Namespace) -> None:
    """Train the few-step LoRA, compare it with its teacher, and leave a sheet of both for eyes."""
    base, vae, target = (args.weights / file for file in (BASE_FILE, VAE_FILE, TWIN_FILE))
    train_twin(args.work, base, vae, target, Recipe(args.twin), args.runs, args.seed, args.processes, log)
    decoder, checker, model = load_decoder(vae), load_checker(args.weights / CHECKER_FILE), load_base(base)
    use_bfloat16(model)
    drawn = {}
    for name, steps in (("teacher", TEACHER_STEPS), ("base", STEPS), ("twin", STEPS)):
        if name == "twin":
            merge(model, load_lora(target))
        drawn[name] = pictures(model, decoder, held_out_prompts(args.prompts), steps)
        shares = _percent(accuracy(drawn[name], held_out(args.prompts), checker))
        log(f"{name}, {steps} steps: {psnr(drawn[name], drawn['teacher']):.2f} dB to the teacher, {shares}")
    sheet(torch.cat([images[:8] for images in drawn.values()]), columns=8).save(args.work / "twin.png")


def make_measure(args: argparse.Namespace) -> None:
    """Sample the held-out prompts, let the checker judge them, and leave a sheet of them for eyes."""
    decoder, checker = load_decoder(args.weights / VAE_FILE), load_checker(args.weights / CHECKER_FILE)
    fresh = fresh_scenes(args.prompts)
    log(f"checker on drawn pictures: {_percent(accuracy(draw(fresh), fresh, checker))}")
    model = load_base(args.weights / BASE_FILE)
    use_bfloat16(model)
    for cfg in args.cfg:
        images = pictures(model, decoder, held_out_prompts(args.prompts), cfg=cfg)
        log(f"samples at cfg {cfg:g}: {_percent(accuracy(images, held_out(args.prompts), checker))}")
        sheet(images, columns=8).save(args.work / f"held_out_cfg{cfg:g}.png")


def _percent(shares: dict[str, float]) -> str:
    return ", ".join(f"{name} {100 * share:.1f} %" for name, share in shares.items())


STAGES: Stages = {
    "vae": make_vae,
    "checker": make_checker,
    "base": make_base,
    "export": make_export,
    "adapter": make_adapter,
    "twin": make_twin,
    "measure": make_measure,
}


def main() -> None:
    parser = command("make", __doc__, STAGES, Path.home() / "dydit_work")
    parser.add_argument("--decoder", type=int, default=1200, help="training steps of the VAE's decoder")
    parser.add_argument("--checker", type=int, default=1000, help="training steps of the checker")
    parser.add_argument("--windows", type=int, default=500, help="training steps on 8 × 8-token windows")
    parser.add_argument("--full", type=int, default=700, help="training steps on whole pictures")
    parser.add_argument("--settle", type=int, default=330, help="training steps with falling learning rate")
    parser.add_argument("--router", type=int, default=1000, help="training steps of an adapter (twice as many with TD-LoRA)")
    parser.add_argument("--kinds", nargs="+", default=list(kinds(1)), choices=list(kinds(1)), help="adapters to make")
    parser.add_argument("--twin", type=int, default=1000, help="training steps of the few-step LoRA")
    parser.add_argument("--runs", type=int, default=1536, help="runs of its teacher that the few-step LoRA learns from")
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts to measure on")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0], help="guidance scales to measure at")
    parser.add_argument("--eager", action="store_true", help="do not use torch.compile")
    run(parser, STAGES)


if __name__ == "__main__":
    main()
