"""A tiny FLUX in a file, encoded prompts for it, and the train command, called as from a shell."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file

from dydit_core.models.flux import Flux, FluxConfig, to_file_key
from dydit_core.train import command
from dydit_core.train.examples import Examples, save_examples

CONFIG = FluxConfig(128, 1, 1, in_channels=4, context_in_dim=8, vec_in_dim=8)
# 16 image tokens, some seconds at most.
SMALL = ("--width", "64", "--height", "64", "--steps", "10", "--batch", "4", "--group", "2", "--runs", "2", "--sampling-steps", "2", "4",
         "--save-every", "4", "--budgets", "0.5", "0.8", "--precision", "fp32", "--device", "cpu")


def write_base(path: Path, dtype: torch.dtype = torch.float32, config: FluxConfig = CONFIG) -> Path:
    """Random weights everywhere: a fresh FLUX would ignore its blocks, whose gates start at zero."""
    torch.manual_seed(0)
    model = Flux(config)
    tensors = {to_file_key(name): torch.randn_like(value) * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3) for name, value in model.state_dict().items()}
    save_file({name: value.to(dtype).contiguous() for name, value in tensors.items()}, path)
    return path


def write_examples(path: Path, latents: bool = False, channels: int = 8) -> Path:
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(sizes, generator=generator) for sizes in ((3, 5, channels), (3, 8), (1, 5, channels), (1, 8))]
    save_examples(path, Examples(tuple(parts[:2]), tuple(parts[2:]), torch.randn(3, 4, 8, 8, generator=generator) if latents else None))
    return path


def train(*flags: object) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args([str(flag) for flag in flags]))
