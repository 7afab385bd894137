"""The small DiT and SiT of drawn scenes: shape, training in two phases (dense, then with routers), file, samples."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..budget import Plan
from ..checkpoints.dit import find_dit
from ..checkpoints.source import open_source
from ..models.dit import EPS, FLOW, DiT, DiTConfig, timestep
from ..routers.dit import DiTRouters
from ..runtime import Method
from ..sampling import eps_sigmas, sample, sigmas
from ..standalone import Budgeted
from ..storage import write_atomically
from ..train.base import Objective, Run, Stage, load, new_run, share, train, use_bfloat16_blocks
from ..train.diffusion import Denoising, init_dit
from ..train.dynamic import DynamicDenoising, router_pace, with_routers
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


@dataclass(frozen=True)
class ClassModel:
    """What is in a file that `export` wrote; `routers` are None in a dense one's."""

    model: DiT
    routers: DiTRouters | None

    @property
    def schedule(self) -> Callable[[int], list[float]]:
        return eps_sigmas if self.model.config.prediction == EPS else sigmas

    def draw(self, labels: Tensor, steps: int = 20, cfg: float = 1.0, seed: int = 0, method: Method | None = None,
             budget: float = 1.0) -> tuple[Tensor, float]:
        """Latents [labels, 4, 32, 32] by Euler steps (for EPS those of DDIM), and the budget they spent; without a method they are
        dense. Label i always gets the same noise."""
        config, schedule = self.model.config, self.schedule(steps)
        noise = schedule[0] * torch.stack([torch.randn(config.in_channels, config.side, config.side, generator=torch.Generator().manual_seed(seed + row))
                                           for row in range(len(labels))])
        none = (torch.tensor([config.classes]),)
        if method is None:
            return sample(self.model.denoise_direction, (labels,), noise, steps, cfg, none, schedule), 1.0
        with Budgeted(self.model, Plan(budget), method, schedule) as budgeted:
            latents = sample(budgeted, (labels,), noise, steps, cfg, none, schedule)
        return latents, budgeted.spent.achieved


def load_class_model(path: Path) -> ClassModel:
    """Raises FileError."""
    found = find_dit(open_source(path))
    model = DiT(found.config)
    model.load_state_dict({key: tensor.float() for key, tensor in found.tensors()})
    return ClassModel(model.eval().requires_grad_(False), found.read_routers())
