"""A tiny random Latte in the host, and what the nodes and samplers of a graph do with it."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

from functools import cache, partial
from typing import Any

import comfy.sample
import tiny_dit
import torch
from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.models.dit import EPS
from dydit_pack.dydit_core.models.latte import LatteConfig
from tiny_dit import load_dit, network
from torch import Tensor

WIDTH, DEPTH, HEADS, SIDE, FRAMES, CLASSES = 64, 4, 4, 12, 5, 10
POSITIONS = (SIDE // 2) ** 2
TOKENS = FRAMES * POSITIONS
sample = partial(tiny_dit.sample, side=(FRAMES, SIDE, SIDE))


def config(**changed: Any) -> LatteConfig:
    return LatteConfig(**{"hidden_size": WIDTH, "depth": DEPTH, "num_heads": HEADS, "side": SIDE, "frames": FRAMES, "classes": CLASSES} | changed)


@cache
def latte(classes: int = CLASSES, prediction: str = EPS) -> ModelPatcher:
    """The fp32 MODEL that tests share."""
    return load_dit(config(classes=classes, prediction=prediction), class_names=tiny_dit.NAMES if classes else ())


@torch.inference_mode()
def euler(shape: LatteConfig, sigmas: Tensor, label: int | None = 3, cfg: float = 1.0, batch: int = 1, seed: int = 5) -> Tensor:
    """The latent that plain torch draws: Euler steps along d x / d sigma."""
    model = network(shape)
    noise = comfy.sample.prepare_noise(torch.zeros(batch, 4, FRAMES, SIDE, SIDE), seed)
    x = noise * (1 + float(sigmas[0]) ** 2) ** 0.5 if shape.prediction == EPS else noise
    for sigma, following in zip(sigmas[:-1], sigmas[1:]):
        def direction(of: int | None) -> Tensor:
            return model.denoise_direction(x, sigma.expand(batch), None if of is None else torch.full((batch,), of))

        cond = direction(label)
        if cfg != 1:
            none = direction(shape.classes)
            cond = none + cfg * (cond - none)
        x = x + (following - sigma) * cond
    return x / 0.18215
