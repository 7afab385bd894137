"""A small training that goes on where it stopped: model, optimizer and step in one file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..storage import write_atomically


def save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """`step`: how many were taken."""
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    write_atomically(path, lambda partial: torch.save(state, partial))


def resume(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Fill both from `path` and return how many steps were taken; 0, and nothing filled, where there is no file."""
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["step"]
