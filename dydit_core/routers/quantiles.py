"""Quantiles of logits, measured on the device during a run and read on the host without waiting for it."""

from __future__ import annotations

import torch
from torch import Tensor

from .token import CapacityTable

_LEVELS = 33


class Quantiles:
    """The last quantiles of each block's logits. A copy to the host that is still under way is used when it has arrived."""

    def __init__(self, blocks: int, table: CapacityTable | None = None) -> None:
        self._host = torch.zeros(blocks, _LEVELS)
        self._arrived: torch.cuda.Event | None = None
        self._table, self._fresh = table, False
        self.any = table is not None  # something was measured, arrived or not

    def copy(self) -> Quantiles:
        """A log of its own that knows what has arrived here."""
        return Quantiles(len(self._host), self.table())

    def put(self, block: int, logits: Tensor) -> None:
        """Measure `logits` [rows, tokens] of one evaluation."""
        self._send(block, torch.quantile(logits.flatten(), torch.linspace(0, 1, _LEVELS, device=logits.device)))
        self._fresh = self.any = True

    def _send(self, block: int, measured: Tensor) -> None:
        if measured.is_cuda:
            if self._arrived is None:
                self._host, self._arrived = self._host.pin_memory(), torch.cuda.Event()
            self._host[block].copy_(measured, non_blocking=True)
            self._arrived.record(torch.cuda.current_stream(measured.device))
        else:
            self._host[block] = measured

    def table(self) -> CapacityTable | None:
        """Capacities by what has arrived, alike at every sigma; None before anything has."""
        if self._fresh and (self._arrived is None or self._arrived.query()):
            self._table, self._fresh = CapacityTable(self._host.clone()[:, None], torch.ones(1)), False
        return self._table
