"""A tiny random DiT in the host, and what the nodes and samplers of a graph do with it."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

from functools import cache
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.models.dit import EPS, FLOW, DiT, DiTConfig
from dydit_pack.dydit_core.models.latte import Latte
from dydit_pack.dydit_core.models.latte import network as built
from dydit_pack.nodes.classes import conditioning
from dydit_pack.nodes.dit import dit_model
from torch import Tensor

WIDTH, DEPTH, HEADS, SIDE, CLASSES = 64, 3, 4, 16, 10
NAMES = tuple(f"thing {number}" for number in range(CLASSES))


def config(prediction: str = EPS, **changed: Any) -> DiTConfig:
    values = {"hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "side": SIDE, "classes": CLASSES,
              "learned_variance": prediction == EPS, "prediction": prediction}
    return DiTConfig(**values | changed)


@cache
def network(shape: DiTConfig) -> DiT | Latte:
    """Random weights that do something: as they are made, every gate of a DiT would be closed."""
    torch.manual_seed(5)
    model = built(shape)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.endswith("embedding_table.weight"):
                value.normal_()
            elif "adaLN_modulation" in name:
                value.mul_(3)
    return model.requires_grad_(False).eval()


def load_dit(shape: DiTConfig, **how: Any) -> ModelPatcher:
    return dit_model(shape, network(shape).state_dict(), **how)


@cache
def dit(prediction: str = EPS) -> ModelPatcher:
    """The fp32 MODEL that tests share."""
    return load_dit(config(prediction), class_names=NAMES)


def transformer(model: ModelPatcher) -> torch.nn.Module:
    return model.model.diffusion_model


def sample(model: ModelPatcher, steps: int = 4, cfg: float = 1.0, sampler: str = "euler", *, batch: int = 1, seed: int = 5, label: int | None = 3,
           negative: list | None = None, positive: list | None = None, side: int | tuple[int, int] = SIDE, scheduler: str = "simple", **options: Any) -> Tensor:
    """What a KSampler does."""
    size = (side, side) if isinstance(side, int) else side
    latent = torch.zeros(batch, 4, *size)
    noise = comfy.sample.prepare_noise(latent, seed)
    return comfy.sample.sample(model, noise, steps, cfg, sampler, scheduler, positive or conditioning(label), negative or conditioning(None), latent,
                               disable_pbar=True, seed=seed, **options)


def noise_of(batch: int = 1, seed: int = 5, side: int = SIDE) -> Tensor:
    return comfy.sample.prepare_noise(torch.zeros(batch, 4, side, side), seed)


@torch.inference_mode()
def euler(shape: DiTConfig, sigmas: Tensor, label: int, cfg: float = 1.0, channels: int = 4, batch: int = 1, seed: int = 5) -> Tensor:
    """The latent that plain torch draws: Euler steps along d x / d sigma, guided in the first `channels`."""
    model, noise = network(shape), noise_of(batch, seed)
    # ComfyUI starts from where the noise stands for the schedule's first sigma: all noise (FLOW), or the noised empty latent.
    start = float(sigmas[0])
    x = noise * (start if shape.prediction == FLOW else (1 + start**2) ** 0.5)
    labels = torch.full((batch,), label)
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        level = sigma.expand(batch)
        direction = model.denoise_direction(x, level, labels)
        if cfg != 1:
            none = model.denoise_direction(x, level, torch.full((batch,), shape.classes))
            guided = none + cfg * (direction - none)
            direction = torch.cat((guided[:, :channels], direction[:, channels:]), dim=1)
        x = x + (following - sigma) * direction
    return x / 0.18215
