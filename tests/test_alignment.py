"""Feature alignment in training: the number, its gradient, and what it changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from toy_training import RECIPE, data, fresh, model, teacher  # noqa: F401 - fixtures

from dydit_core.parts import Gate
from dydit_core.routers.token import TokenScores
from dydit_core.train.alignment import dense_outputs, misalignment, outputs
from dydit_core.train.gates import Gates
from dydit_core.train.rollout import roll_out
from dydit_core.train.router import train_step
from dydit_core.train.teacher import Teacher
from dydit_core.train.trajectories import Trajectories, Window

PARTS = 4  # the double block hands on image and text, two single blocks one each


def window(data: list[Trajectories], length: int = 1) -> Window:  # noqa: F811
    return data[0].draw(3, length, torch.Generator().manual_seed(0))


class ShutLast(TokenScores):
    """Skips every token of the last block alone."""

    def __init__(self) -> None:
        super().__init__(3, 64, 4)

    def forward(self, gate: Gate, change: torch.Tensor | None = None) -> torch.Tensor:
        return torch.full(gate.image.shape[:2], -1.0 if gate.block == 2 else 1.0)


def test_it_is_the_share_of_what_each_block_gets_wrong(teacher: Teacher, data: list[Trajectories]) -> None:  # noqa: F811
    now = window(data)
    assert roll_out(teacher, Gates(), now, 0.0, [None], align=True).misaligned < 1e-12
    assert roll_out(teacher, Gates(), now, 0.0, [None]).misaligned is None
    before, after = dense_outputs(teacher, now, 0)[-2:]
    found = roll_out(teacher, Gates(ShutLast()), now, 0.0, [None], align=True)
    # Skipped, an image token leaves the block as it came in; text tokens are computed.
    wrong = (after - before)[:, -16:].square().sum() / after.square().sum()
    torch.testing.assert_close(found.misaligned, wrong / PARTS)
    assert wrong > 0.01


def test_it_is_followed_along_a_window(teacher: Teacher, data: list[Trajectories]) -> None:  # noqa: F811
    now = window(data, 3)
    both = roll_out(teacher, Gates(ShutLast()), now, 0.0, [None] * 3, align=True)
    assert both.misaligned > 0 and torch.equal(both.drift, roll_out(teacher, Gates(ShutLast()), now, 0.0, [None] * 3).drift)
    assert all(not block._forward_hooks for block in teacher.family.blocks(teacher.model))


def test_outputs_are_listened_to_no_longer_than_asked(teacher: Teacher, data: list[Trajectories]) -> None:  # noqa: F811
    now = window(data)
    with outputs(teacher.family.blocks(teacher.model)) as found:
        teacher.velocity(now.x[:, 0], now.sigmas[:, 0], *now.conditioning)
    teacher.velocity(now.x[:, 0], now.sigmas[:, 0], *now.conditioning)
    assert len(found) == PARTS and misalignment(found, dense_outputs(teacher, now, 0)) < 1e-12


def test_training_hears_of_it(teacher: Teacher, data: list[Trajectories]) -> None:  # noqa: F811
    """The same first step with and without: another loss, other gradients, the same gauge."""
    plain, aligned = fresh(teacher, data), fresh(teacher, data)
    recipe = replace(RECIPE, align=0.5)
    losses = train_step(plain, teacher, data, RECIPE), train_step(aligned, teacher, data, recipe)
    assert losses[0] != losses[1] and torch.equal(plain.gauge, aligned.gauge)
    assert not torch.equal(plain.gates.tokens.weight, aligned.gates.tokens.weight)
    assert all(param.grad is None for param in teacher.model.parameters())
