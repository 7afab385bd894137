"""Which way things move in a video, seen by matching: the pixels that changed are looked for in the frame before, a token away."""

from __future__ import annotations

import torch
from torch import Tensor

from .moving import CLASSES, DOWN, EAST, NAMES, UP, WEST, Step
from .scenes import TOKEN

REST: Step = (0, 0)
STEPS = (EAST, WEST, UP, DOWN, REST)
# A pixel has changed where its channels differ by more than this in the mean; videos of fewer such pixels rest.
CHANGED, LEAST_SHARE = 0.06, 0.002
_AT_ONCE = 16


def directions(frames: Tensor) -> list[Step]:
    """Of each of `frames` [videos, frames, 3, H, W] in 0…1 the step that predicts best, from each frame, what changed in the next;
    REST where next to nothing changes, or the frame before predicts it better as it is."""
    return [STEPS[index] for some in frames.split(_AT_ONCE) for index in _best(some).tolist()]


def moves_as_said(frames: Tensor, labels: Tensor) -> Tensor:
    """Whether things in `frames` (see `directions`) go the way that their classes `labels` [videos] say; booleans [videos]."""
    said = [CLASSES[NAMES[label]].step for label in labels.tolist()]
    return torch.tensor([step == other for step, other in zip(directions(frames), said)])


def _best(frames: Tensor) -> Tensor:
    """Places in STEPS [videos]."""
    before, after = frames[:, :-1], frames[:, 1:]
    changed = (after - before).abs().mean(2) > CHANGED
    errors = torch.stack([_error(before, after, changed, step) for step in STEPS], dim=1)
    moves = changed.float().mean((1, 2, 3)) > LEAST_SHARE
    return errors.argmin(1).where(moves, torch.tensor(STEPS.index(REST)))


def _error(before: Tensor, after: Tensor, changed: Tensor, step: Step) -> Tensor:
    """Mean absolute difference [videos] between the changed pixels of `after` and those of `before` that lie a step back, where
    the camera saw them."""
    right, down = (TOKEN * part for part in step)
    height, width = after.shape[-2:]
    rows, columns = slice(max(0, down), height + min(0, down)), slice(max(0, right), width + min(0, right))
    there = torch.roll(before, (down, right), dims=(-2, -1))
    off = (after - there).abs().mean(2)[..., rows, columns]
    seen = changed[..., rows, columns]
    return (off * seen).sum((1, 2, 3)) / seen.sum((1, 2, 3)).clamp(min=1)
