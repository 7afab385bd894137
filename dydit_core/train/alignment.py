"""Feature alignment: what every block of the gated model hands on, held to what it hands on in the dense one.

The features of all blocks beside the answer, as FitNets has it for one (arXiv 1412.6550): a gate deep in the model hears of
its error at once, and not through all blocks after it. It costs a dense evaluation for each gated one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .teacher import Teacher
from .trajectories import Window


@contextmanager
def outputs(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """What `blocks` give while this is open, in the order they run; a FLUX double block gives image and text."""
    found: list[Tensor] = []

    def note(block: nn.Module, given: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        found.extend(out if isinstance(out, tuple) else (out,))

    hooks = [block.register_forward_hook(note) for block in blocks]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def dense_outputs(teacher: Teacher, window: Window, step: int) -> list[Tensor]:
    """Of the dense model, at one point of its own run."""
    with outputs(teacher.family.blocks(teacher.model)) as found:
        teacher.velocity(window.x[:, step], window.sigmas[:, step], *window.conditioning)
    return found


def misalignment(found: Sequence[Tensor], dense: Sequence[Tensor]) -> Tensor:
    """Squared distance over the dense features' own square, mean over blocks."""
    return torch.stack([(a.float() - b.float()).square().sum() / b.float().square().sum() for a, b in zip(found, dense, strict=True)]).mean()
