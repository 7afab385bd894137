"""Make the class-conditional demo models from nothing: `python -m dydit_core.demo.make_dit --work DIR [STAGE …]`.

Every stage skips what is already done, so the same command continues after an interruption.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from ..checkpoints.dit import find_dit
from ..checkpoints.source import open_source
from ..runtime import Method
from ..substitutes.nothing import Nothing
from ..train.calibrate_dit import measure, write_calibrated
from .autoencoder import train_autoencoder
from .checker import load_checker
from .class_data import ClassData, load_class_data
from .class_model import by_class, export, load_class_model
from .classes import NAMES, recognized
from .dit import CONFIGS, SCENES, dense, dynamic, fresh, routed, twin
from .files import CHECKER_FILE, CLASS_VAE_FILE, WEIGHTS, class_file
from .phase import train_phase
from .preview import sheet
from .stages import Stages, command, log, run
from .vae import decode, export_learned_vae, load_decoder


def make_vae(args: argparse.Namespace) -> None:
    export_learned_vae(*train_autoencoder(args.work, args.autoencoder, args.seed, log), args.weights / CLASS_VAE_FILE)


def _data(args: argparse.Namespace) -> ClassData:
    return load_class_data(args.work, args.weights / CLASS_VAE_FILE, SCENES, log)


def make_dense(name: str, args: argparse.Namespace) -> None:
    """The SiT begins as the DiT, which knows by then what the pictures are made of."""
    model = fresh(name, args.seed) if name == "dit" else twin(args.work / "dit_dense.pt", args.seed)
    steps = (args.windows, args.full, args.settle) if name == "dit" else (0, args.full_sit, args.settle_sit)
    phase = dense(name, _data(args), *steps)
    train_phase(args.work, model, phase, args.seed, args.processes, log)


def make_dynamic(name: str, args: argparse.Namespace) -> None:
    """The file that ships is calibrated: it meets any budget from the first evaluation on."""
    phase = dynamic(name, _data(args), args.dynamic)
    train_phase(args.work, routed(name, args.work / f"{name}_dense.pt"), phase, args.seed, args.processes, log)
    title = f"DyDiT demo: a small Dy{'SiT' if name == 'sit' else 'DiT'} of drawn scenes, by class"
    plain = args.work / f"{name}_dynamic.safetensors"
    export(args.work / phase.checkpoint, CONFIGS[name], NAMES, plain, title)
    found = find_dit(open_source(plain))
    write_calibrated(found, measure(found, seed=args.seed), args.weights / class_file(name))
    log(f"{class_file(name).name}: calibrated")
    export(args.work / f"{name}_dense.pt", CONFIGS[name], NAMES, args.work / f"{name}_dense.safetensors", title)


def make_measure(args: argparse.Namespace) -> None:
    """Sample every class, let the checker judge, and leave sheets for eyes: the dense model, then the file's own decisions."""
    decoder, checker = load_decoder(args.weights / CLASS_VAE_FILE), load_checker(WEIGHTS / CHECKER_FILE)
    labels = torch.arange(len(NAMES)).repeat(args.each)
    for name in args.models:
        for kind, path in (("dense", args.work / f"{name}_dense.safetensors"), ("gated", args.weights / class_file(name))):
            if not path.exists():
                continue
            drawn = load_class_model(path)
            method = None if drawn.routers is None else Method(drawn.routers.by_threshold(), Nothing())
            for cfg in args.cfg:
                latents, spent = drawn.draw(labels, args.steps, cfg, args.seed, method)
                images = decode(latents, decoder)
                right = recognized(images, labels, checker).float()
                log(f"{name} {kind} at cfg {cfg:g}: spent {spent:.3f}, {100 * right.mean():.1f} % recognised ({by_class(right, labels, NAMES)})")
                sheet(images, len(NAMES)).save(args.work / f"{name}_{kind}_cfg{cfg:g}.png")


STAGES: Stages = {
    "vae": make_vae,
    "dit": lambda args: make_dense("dit", args),
    "dit_dynamic": lambda args: make_dynamic("dit", args),
    "sit": lambda args: make_dense("sit", args),
    "sit_dynamic": lambda args: make_dynamic("sit", args),
    "measure": make_measure,
}


def main() -> None:
    parser = command("make_dit", __doc__, STAGES, Path.home() / "dydit_work" / "dit")
    parser.add_argument("--autoencoder", type=int, default=2000, help="training steps of the VAE")
    parser.add_argument("--windows", type=int, default=800, help="training steps of the DiT on 8 × 8-token windows")
    parser.add_argument("--full", type=int, default=1400, help="training steps of the DiT on whole pictures")
    parser.add_argument("--settle", type=int, default=800, help="training steps of the DiT with falling learning rate")
    parser.add_argument("--full-sit", type=int, default=700, help="training steps of the SiT, from the DiT's weights")
    parser.add_argument("--settle-sit", type=int, default=500, help="training steps of the SiT with falling learning rate")
    parser.add_argument("--dynamic", type=int, default=700, help="training steps with routers, for each")
    parser.add_argument("--models", nargs="+", default=["dit", "sit"], choices=["dit", "sit"], help="to measure")
    parser.add_argument("--each", type=int, default=4, help="pictures of each class to measure on")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps to measure with")
    parser.add_argument("--cfg", type=float, nargs="+", default=[1.0, 2.0], help="guidance scales to measure at")
    run(parser, STAGES)


if __name__ == "__main__":
    main()
