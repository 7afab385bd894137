"""Gradient checkpointing: a block keeps its inputs alone, and is run again when its gradient is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from ..blocks import Backend, Family
from .gates import TrainingPass


@dataclass(frozen=True)
class Recomputed:
    """A `blocks.Family` that runs the blocks of `family` so, under a `TrainingPass`."""

    family: Family

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def forward(self, block: nn.Module, index: int, current: TrainingPass, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        passes, names = [current], tuple(kwargs)

        def run(*inputs: Any) -> Any:
            now = passes.pop() if passes else current.aside()
            return self.family.forward(block, index, now, backend, *inputs[: len(args)], **dict(zip(names, inputs[len(args) :])))

        # Nothing in a block is drawn at random: the noise of the gates is given.
        return checkpoint(run, *args, *kwargs.values(), use_reentrant=False, preserve_rng_state=False)
