"""A few evaluations in a row as they will be run: skipped tokens, what stands in for them, and the picture that follows.

With reuse a run begins with an evaluation that computes everything, so windows begin after it. The dense run is the path.
What gates change in the velocity of one evaluation moves the picture off it, and the next evaluation starts there; with
reuse it also finds the values that this one left. In a guided run the other branch is taken to be dense.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sampling import unsqueezed
from .alignment import dense_outputs, misalignment, outputs
from .gates import Gates, Noise, Past, TrainingPass
from .teacher import Teacher
from .trajectories import Window


@dataclass(frozen=True)
class Outcome:
    """`drift`, like a point of the window: how far off the dense run the window ends; the `passes` of its evaluations, and, where it
    was asked for, the mean `misalignment` of their features."""

    drift: Tensor
    passes: list[TrainingPass]
    misaligned: Tensor | None = None


def roll_out(teacher: Teacher, gates: Gates, window: Window, shift: Tensor | float, noise: Sequence[Noise | None],
             tau: float = 1.0, reuse: bool = False, align: bool = False) -> Outcome:
    """Run `window` with the gates moved by `shift` and by the `noise` of each evaluation."""
    past = _past(teacher, window) if reuse else None
    drift, passes, misaligned = torch.zeros_like(window.x[:, 0]), [], []
    for step in range(window.length):
        sigma, following = window.sigmas[:, step], window.sigmas[:, step + 1]
        current = TrainingPass(gates, teacher.geometry(window.x, window.conditioning).text_tokens, teacher.level(sigma), shift, noise[step], tau, past)
        with outputs(teacher.family.blocks(teacher.model) if align else ()) as found:
            velocity = teacher.gated(current, window.x[:, step] + drift, sigma, *window.conditioning)
        if align:
            misaligned.append(misalignment(found, dense_outputs(teacher, window, step)))
        stride = unsqueezed((following - sigma) * window.pull, drift)
        drift = drift + stride * (velocity - window.velocity[:, step])
        passes.append(current)
        past = current.history if reuse else None
    return Outcome(drift, passes, torch.stack(misaligned).mean() if align else None)


@torch.no_grad()
def _past(teacher: Teacher, window: Window) -> Past:
    """What the dense evaluation before leaves."""
    current = TrainingPass(Gates(), teacher.geometry(window.x, window.conditioning).text_tokens, window.sigma_before, past=Past())
    teacher.gated(current, window.before, window.sigma_before, *window.conditioning)
    return current.history
