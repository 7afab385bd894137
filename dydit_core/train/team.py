"""Several single-threaded processes that train one model together.

On busy cores this is much faster than one process with several threads, whose every matrix product waits for the
slowest thread. Weights live in shared memory; each process computes the gradient of some rows of the batch and
updates its own share of the weights, so one step of a team is one step of a single process, split.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from typing import Any

import torch
from torch import Tensor


class Team:
    """One member's view. A team of one needs no barrier and no shared memory."""

    def __init__(self, rank: int = 0, size: int = 1, barrier: Barrier | None = None, gradients: Tensor | None = None,
                 taken: Synchronized[int] | None = None) -> None:
        self.rank, self.size = rank, size
        self._barrier, self._gradients, self._taken = barrier, gradients, taken

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def portions(self, rows: int, portion: int) -> Iterator[slice]:
        """Slices of a batch of `rows`, `portion` rows each, until the team has taken all of them.

        Whoever is quick takes more: on busy cores fixed shares would leave most members waiting for the slowest.
        """
        if self._taken is None:
            yield slice(0, rows)
            return
        while True:
            with self._taken.get_lock():
                start = self._taken.value
                self._taken.value += portion
            if start >= rows:
                return
            yield slice(start, start + portion)

    def owns(self, index: int) -> bool:
        """Whether this member updates weight number `index`."""
        # Weights and biases alternate; in pairs, every member gets both.
        return index // 2 % self.size == self.rank

    def wait(self) -> None:
        if self._barrier is not None:
            self._barrier.wait()

    def leave(self) -> None:
        """Nothing is exchanged any more."""

    def exchange(self, params: list[Tensor], loss: float) -> float:
        """Leave the team's summed gradient on owned `params`, none on the others; returns the summed loss."""
        if self._gradients is None or self._taken is None:
            return loss
        own = self._gradients[self.rank]
        own.copy_(flat_gradient(params, loss))
        self.wait()
        self._taken.value = 0
        start = 0
        for index, param in enumerate(params):
            piece = self._gradients[:, start : start + param.numel()]
            param.grad = piece.sum(0).view_as(param) if self.owns(index) else None
            start += param.numel()
        return self._gradients[:, start].sum().item()


def share(optimizer: torch.optim.Optimizer) -> None:
    """Move the weights that it trains, and its momenta, into shared memory."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.data.share_memory_()
            for value in optimizer.state[param].values():
                value.share_memory_()


def flat_gradient(params: list[Tensor], loss: float) -> Tensor:
    """The gradients of `params` and `loss` after them, in one row; zeros where a member took no rows, or none that touch a weight."""
    grads = [torch.zeros_like(param) if param.grad is None else param.grad for param in params]
    return torch.cat([*(grad.flatten() for grad in grads), grads[0].new_tensor([loss])])


def together(work: Callable[..., None], size: int, numbers: int, *args: Any) -> None:
    """Call `work(team, *args)` in `size` processes; tensors in `args` must be in shared memory.

    `numbers` is how many gradients there are. Raises what a member raised.
    """
    if size == 1:
        work(Team(), *args)
        return
    context = torch.multiprocessing.get_context("spawn")
    gradients = torch.zeros(size, numbers + 1).share_memory_()
    shared = (size, context.Barrier(size), gradients, context.Value("q", 0))
    torch.multiprocessing.spawn(_member, (work, shared, args), nprocs=size)


def _member(rank: int, work: Callable[..., None], shared: tuple[Any, ...], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A shell's background jobs ignore it; torch sends it to members whose parent was killed, which would else train on.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    work(Team(rank, *shared), *args)
