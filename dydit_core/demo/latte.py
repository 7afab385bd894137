"""The small Latte of drawn videos: shape, training, frames."""

from __future__ import annotations

import torch
from torch import Tensor

from ..models.dit import FLOW
from ..models.latte import Latte, LatteConfig
from ..train.base import Stage
from ..train.diffusion import Denoising, init_dit
from .autoencoder import CHANNELS
from .class_data import ClassData
from .codec import PATCH
from .moving import FRAMES, NAMES, SIDE
from .phase import Phase
from .vae import Decoder, decode

LATTE = LatteConfig(hidden_size=192, depth=8, num_heads=6, in_channels=CHANNELS, side=SIDE // PATCH, frames=FRAMES,
                    classes=len(NAMES), prediction=FLOW, learned_variance=False)
SCENES = 4_096
RATE = 1.5e-3
# Which way things go is settled where noise hides nearly all of a video, so more of it is learned there; a network that predicts
# noise never told classes apart that differ in nothing else.
SHIFT = 4.0


def dense(data: ClassData, full: int, settle: int) -> Phase:
    """Whole videos throughout: in a window of one, things would come from nowhere."""
    stages = (Stage("full", full, batch=16, window=None, start=RATE, end=RATE),
              Stage("settle", settle, batch=16, window=None, start=RATE, end=RATE * 0.01))
    return Phase("latte_dense.pt", stages, Denoising(data, portion=4, shift=SHIFT))


def fresh(seed: int) -> Latte:
    """Random."""
    torch.manual_seed(seed)
    return init_dit(Latte(LATTE))


def decode_videos(latents: Tensor, decoder: Decoder) -> Tensor:
    """Frames [videos, frames, 3, 8H, 8W] in 0…1 of latents [videos, 4, frames, H, W]."""
    return decode(latents.transpose(1, 2).flatten(0, 1), decoder).unflatten(0, (len(latents), -1))
