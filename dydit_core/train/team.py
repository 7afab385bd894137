"""Several single-threaded processes that train one model together.

On busy cores this is much faster than one process with several threads, whose every matrix product waits for the
slowest thread. Weights live in shared memory; each process computes the gradient of its rows of the batch and
updates its own share of the weights, so one step of a team is one step of a single process, split.
"""

from __future__ import annotations

from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor


class Team:
    """One member's view. A team of one needs no barrier and no shared memory."""

    def __init__(self, rank: int = 0, size: int = 1, barrier: Barrier | None = None,
                 gradients: Tensor | None = None) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._gradients = barrier, gradients

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def rows(self, tensor: Tensor) -> Tensor:
        """This member's rows of a batch."""
        return tensor[self.rank :: self.size]

    def owns(self, index: int) -> bool:
        """Whether this member updates weight number `index`."""
        # Weights and biases alternate; in pairs, every member gets both.
        return index // 2 % self.size == self.rank

    def wait(self) -> None:
        if self._barrier is not None:
            self._barrier.wait()

    def exchange(self, params: list[Tensor], loss: Tensor) -> float:
        """Leave the team's mean gradient on owned `params` and none on the others; returns the team's mean loss."""
        if self._gradients is None:
            return loss.item()
        torch.cat([param.grad.flatten() for param in params] + [loss.detach().view(1)], out=self._gradients[self.rank])
        self.wait()
        start = 0
        for index, param in enumerate(params):
            piece = self._gradients[:, start : start + param.numel()]
            param.grad = piece.mean(0).view_as(param) if self.owns(index) else None
            start += param.numel()
        return self._gradients[:, start].mean().item()


def together(work: Callable[..., None], size: int, numbers: int, *args: Any) -> None:
    """Call `work(team, *args)` in `size` processes; tensors in `args` must be in shared memory.

    `numbers` is how many gradients there are. Raises what a member raised.
    """
    if size == 1:
        work(Team(), *args)
        return
    context = torch.multiprocessing.get_context("spawn")
    gradients = torch.zeros(size, numbers + 1).share_memory_()
    torch.multiprocessing.spawn(_member, (work, size, context.Barrier(size), gradients, args), nprocs=size)


def _member(rank: int, work: Callable[..., None], size: int, barrier: Barrier, gradients: Tensor,
            args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    work(Team(rank, size, barrier, gradients), *args)
