"""The small DiT and SiT of drawn scenes: shape, training in two phases (dense, then with routers), file, samples."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.dit import EPS, FLOW, DiT, DiTConfig, eps_log_sigmas, timestep
from ..storage import write_atomically
from ..train.base import Objective, Run, Stage, load, new_run, share, train, use_bfloat16_blocks
from ..train.diffusion import Denoising, init_dit
from ..train.dynamic import Decisions, DynamicDenoising, router_pace, with_routers
from ..train.team import Team, together
from .autoencoder import CHANNELS
from .class_data import ClassData
from .classes import NAMES
from .data import Log

DIT = DiTConfig(hidden_size=192, depth=7, num_heads=6, in_channels=CHANNELS, classes=len(NAMES))
SIT = replace(DIT, prediction=FLOW, learned_variance=False)
CONFIGS = {"dit": DIT, "sit": SIT}
SCENES = 8_192
RATE, DYNAMIC_RATE = 1.5e-3, 4e-4


@dataclass(frozen=True)
class Phase:
    """One training of one network: `checkpoint` is a name in the working directory."""

    checkpoint: str
    stages: tuple[Stage, ...]
    objective: Objective


def dense(name: str, data: ClassData, windows: int, full: int, settle: int) -> Phase:
    stages = (Stage("windows", windows, batch=64, window=8, start=RATE, end=RATE),
              Stage("full", full, batch=32, window=16, start=RATE, end=RATE),
              Stage("settle", settle, batch=32, window=16, start=RATE, end=RATE * 0.01))
    return Phase(f"{name}_dense.pt", stages, Denoising(data))


def dynamic(name: str, data: ClassData, steps: int) -> Phase:
    stage = Stage("dynamic", steps, batch=32, window=16, start=DYNAMIC_RATE, end=DYNAMIC_RATE * 0.01)
    return Phase(f"{name}_dynamic.pt", (stage,), DynamicDenoising(data, steps))


def averaged(checkpoint: Path) -> dict[str, Tensor]:
    """Weights of a finished phase: the average where there is one."""
    state = torch.load(checkpoint, weights_only=True)
    return {**state["model"], **state["ema"]}


def fresh(name: str, seed: int, start: Path | None) -> DiT:
    """The dense network, random, or with what fits of the weights that another phase left in `start`."""
    torch.manual_seed(seed)
    model = init_dit(DiT(CONFIGS[name]))
    if start is not None:
        own = model.state_dict()
        model.load_state_dict({key: value for key, value in averaged(start).items() if own[key].shape == value.shape}, strict=False)
    return model


def routed(name: str, start: Path) -> DiT:
    """The network that the dense phase left in `start`, with untrained routers."""
    model = DiT(CONFIGS[name])
    model.load_state_dict(averaged(start))
    return with_routers(model)


def train_phase(work: Path, model: DiT, phase: Phase, seed: int, processes: int, log: Log = print) -> None:
    """Train, or continue, `phase` in `work`."""
    run = new_run(model, seed, router_pace)
    checkpoint = work / phase.checkpoint
    if checkpoint.exists():
        load(run, checkpoint)
        log(f"continuing at step {run.step}")
    if run.step >= sum(stage.steps for stage in phase.stages):
        return
    share(run)
    numbers = sum(param.numel() for param in run.ema.values())
    together(_train_member, processes, numbers, run, phase, checkpoint, log)


def _train_member(team: Team, run: Run, phase: Phase, checkpoint: Path, log: Log) -> None:
    method = "gated" if hasattr(run.model.blocks[0], "gated") else "forward"
    use_bfloat16_blocks(run.model.blocks, method=method)
    train(run, phase.objective, phase.stages, checkpoint, log, team=team)


def export(checkpoint: Path, name: str, target: Path, title: str) -> None:
    """The averaged weights in half precision, under the names of the authors' files."""
    tensors = {key: value.half().contiguous() for key, value in averaged(checkpoint).items()}
    facts = {"classes": json.dumps(NAMES), "prediction": CONFIGS[name].prediction, "heads": str(CONFIGS[name].num_heads),
             "modelspec.title": title}
    write_atomically(target, lambda partial: save_file(tensors, partial, facts))


def load_dit(path: Path) -> DiT:
    """The network in a file that `export` wrote, with its routers where it has some."""
    with safe_open(path, "pt") as file:
        tensors, prediction = {key: file.get_tensor(key).float() for key in file.keys()}, file.metadata()["prediction"]
    name = next(name for name, config in CONFIGS.items() if config.prediction == prediction)
    dense = DiT(CONFIGS[name])
    model = with_routers(dense) if any("router" in key for key in tensors) else dense
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)


def levels(prediction: str, steps: int) -> list[float]:
    """`steps` + 1 falling sigmas, the last one 0: evenly spaced timesteps of DiT's 1000, or of the straight path."""
    if prediction == FLOW:
        return [1 - step / steps for step in range(steps + 1)]
    places = torch.linspace(999, 0, steps).round().long()
    return [*eps_log_sigmas()[places].exp().tolist(), 0.0]


@torch.no_grad()
def sample(model: DiT, labels: Tensor, steps: int = 20, cfg: float = 1.0, seed: int = 0, routed: bool = False) -> Tensor:
    """Latents [labels, 4, 32, 32] by Euler steps (DDIM, for EPS); label i always gets the same noise. `routed`: the file's own gates decide."""
    config, schedule = model.config, levels(model.config.prediction, steps)
    noise = torch.stack([torch.randn(config.in_channels, config.side, config.side, generator=torch.Generator().manual_seed(seed + row))
                         for row in range(len(labels))])
    x = noise * (schedule[0] if config.prediction == EPS else 1.0)
    none = torch.full_like(labels, config.classes)

    def direction(classes: Tensor, sigma: Tensor) -> Tensor:
        options = {"decisions": Decisions(model.embed_time(timestep(sigma, config.prediction), x.dtype))} if routed else None
        return model.denoise_direction(x, sigma, classes, options)

    for now, following in zip(schedule, schedule[1:]):
        sigma = torch.full((len(labels),), now)
        found = direction(labels, sigma)
        if cfg != 1.0:
            found = torch.lerp(direction(none, sigma), found, cfg)
        x = x + (following - now) * found
    return x
