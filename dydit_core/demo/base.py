"""The demo's base model: its shape, its training schedule, and the file it ships as."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..models.flux import Flux, FluxConfig, config_from_state_dict, from_file_key, to_file_key
from ..storage import write_atomically
from ..train.base import Run, Stage, load, new_run, share, train, use_bfloat16_blocks
from ..train.flow import FluxFlow, init_flux
from ..train.team import Team, together
from .data import Log, load_data
from .prompt import CONTEXT_DIM, POOLED_DIM, encode_batch

CONFIG = FluxConfig(
    hidden_size=384,
    depth=2,
    depth_single_blocks=4,
    in_channels=16,
    context_in_dim=CONTEXT_DIM,
    vec_in_dim=POOLED_DIM,
)
SCENES = 20_480
RATE = 1.5e-3
CHECKPOINT = "base.pt"


def stages(windows: int, full: int, settle: int) -> tuple[Stage, ...]:
    """Cheap windows first, then whole pictures, then the learning rate goes down and the edges get sharp."""
    return (
        Stage("windows", windows, batch=64, window=8, start=RATE, end=RATE),
        Stage("full", full, batch=32, window=16, start=RATE, end=RATE),
        Stage("settle", settle, batch=32, window=16, start=RATE, end=RATE * 0.01),
    )


def train_base(work: Path, plan: tuple[Stage, ...], seed: int = 0, processes: int = 2, compile_blocks: bool = True,
               log: Log = print) -> None:
    """Train, or continue, the base model in `work`; done when `work/base.pt` has taken all steps of `plan`."""
    data = load_data(work, SCENES, log)
    objective = FluxFlow(data, encode_batch([""]))
    torch.manual_seed(seed)
    run = new_run(init_flux(Flux(CONFIG)), seed)
    checkpoint = work / CHECKPOINT
    if checkpoint.exists():
        load(run, checkpoint)
        log(f"continuing at step {run.step}")
    share(run)
    numbers = sum(param.numel() for param in run.model.parameters())
    together(_train_member, processes, numbers, run, objective, plan, checkpoint, compile_blocks, log)


def _train_member(team: Team, run: Run, objective: FluxFlow, plan: tuple[Stage, ...], checkpoint: Path,
                  compile_blocks: bool, log: Log) -> None:
    use_bfloat16(run.model, compile_blocks)
    train(run, objective, plan, checkpoint, log, team=team)


def use_bfloat16(model: Flux, compile_blocks: bool = False) -> None:
    use_bfloat16_blocks((*model.double_blocks, *model.single_blocks), compile_blocks)


def export_base(checkpoint: Path, target: Path) -> None:
    """Write the averaged weights as a bfloat16 file with the key names of the released FLUX files."""
    ema = torch.load(checkpoint, weights_only=True)["ema"]
    tensors = {to_file_key(key): value.to(torch.bfloat16).contiguous() for key, value in ema.items()}
    write_atomically(target, lambda partial: save_file(tensors, partial))


def load_base(path: Path, dtype: torch.dtype = torch.float32) -> Flux:
    """The model in a file that `export_base` wrote."""
    tensors = load_file(path)
    model = Flux(config_from_state_dict({key: tuple(value.shape) for key, value in tensors.items()}))
    model.load_state_dict({from_file_key(key): value.to(dtype) for key, value in tensors.items()})
    return model.to(dtype).eval().requires_grad_(False)
