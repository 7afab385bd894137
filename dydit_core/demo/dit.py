"""The small DiT and SiT of drawn scenes: shape and training, in two phases (dense, then with routers)."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from ..models.dit import EPS, FLOW, DiT, DiTConfig, timestep
from ..train.base import Stage
from ..train.diffusion import Denoising, init_dit
from ..train.dynamic import DynamicDenoising, with_routers
from .autoencoder import CHANNELS
from .class_data import ClassData
from .classes import NAMES
from .phase import Phase, averaged

DIT = DiTConfig(hidden_size=192, depth=7, num_heads=6, in_channels=CHANNELS, classes=len(NAMES))
SIT = replace(DIT, prediction=FLOW, learned_variance=False)
CONFIGS = {"dit": DIT, "sit": SIT}
SCENES = 8_192
RATE, DYNAMIC_RATE = 1.5e-3, 4e-4


def dense(name: str, data: ClassData, windows: int, full: int, settle: int) -> Phase:
    stages = (Stage("windows", windows, batch=64, window=8, start=RATE, end=RATE),
              Stage("full", full, batch=32, window=16, start=RATE, end=RATE),
              Stage("settle", settle, batch=32, window=16, start=RATE, end=RATE * 0.01))
    return Phase(f"{name}_dense.pt", stages, Denoising(data))


def dynamic(name: str, data: ClassData, steps: int) -> Phase:
    stage = Stage("dynamic", steps, batch=32, window=16, start=DYNAMIC_RATE, end=DYNAMIC_RATE * 0.01)
    return Phase(f"{name}_dynamic.pt", (stage,), DynamicDenoising(data, steps))


def fresh(name: str, seed: int) -> DiT:
    """The dense network, random."""
    torch.manual_seed(seed)
    return init_dit(DiT(CONFIGS[name]))


def twin(start: Path, seed: int) -> DiT:
    """The SiT, with all of the DiT that `start` holds but its last layer, which answers another question."""
    dense, model = DiT(CONFIGS["dit"]), fresh("sit", seed)
    weights = averaged(start)
    dense.load_state_dict(weights)
    own = model.state_dict()
    model.load_state_dict({key: value for key, value in weights.items() if own[key].shape == value.shape}, strict=False)
    _call_alike(model, dense)
    return model


def _call_alike(model: DiT, dense: DiT, steps: int = 1000) -> None:
    """Teach the SiT's timestep embedder to say of a noise level what the DiT's says of the same: they count differently."""
    share = torch.linspace(0.004, 0.996, 512)
    with torch.no_grad():
        said = dense.embed_time(timestep(share / (1 - share), EPS), torch.float32)
    optimizer = torch.optim.Adam(model.t_embedder.parameters())
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / steps)
        error = (model.embed_time(timestep(share, FLOW), torch.float32) - said).square().mean()
        optimizer.zero_grad(set_to_none=True)
        error.backward()
        optimizer.step()


def routed(name: str, start: Path) -> DiT:
    """The network that the dense phase left in `start`, with untrained routers."""
    model = DiT(CONFIGS[name])
    model.load_state_dict(averaged(start))
    return with_routers(model)
