"""Several processes of one training that `accelerate launch` or torchrun started: one for each GPU, or on CPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .settings import SettingError
from .team import Team, flat_gradient


class ProcessTeam(Team):
    """A member that has all weights to itself and takes a fixed share of a batch; gradients are summed over all members.

    As all take the same steps from the same start, their weights stay the same.
    """

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.process_index, accelerator.num_processes)
        self._accelerator = accelerator

    def portions(self, rows: int, portion: int) -> Iterator[slice]:
        for start in range(self.rank * portion, rows, self.size * portion):
            yield slice(start, start + portion)

    def owns(self, index: int) -> bool:
        return True

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()

    def exchange(self, params: list[Tensor], loss: float) -> float:
        summed = self._accelerator.reduce(flat_gradient(params, loss), "sum")
        start = 0
        for param in params:
            param.grad = summed[start : start + param.numel()].view_as(param)
            start += param.numel()
        return summed[-1].item()

    def leave(self) -> None:
        # Threads of a group that is left standing abort the process when it ends.
        torch.distributed.destroy_process_group()


def join(device: str) -> tuple[Team, torch.device]:
    """This process's place among those that were started together, and its device; `device`: auto, cpu or cuda."""
    if device == "cuda" and not torch.cuda.is_available():
        raise SettingError("--device is cuda, and PyTorch finds no GPU here; take --device cpu, or install PyTorch with CUDA.")
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Team(), torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    try:
        from accelerate import Accelerator
    except ImportError:
        raise SettingError("Several processes need accelerate, which is not installed; run: pip install accelerate.") from None
    accelerator = Accelerator(cpu=device == "cpu" or not torch.cuda.is_available())
    return ProcessTeam(accelerator), accelerator.device if accelerator.device.type == "cuda" else torch.device("cpu")
