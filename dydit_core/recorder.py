"""Recording a run without holding it up: what was computed leaves the device asynchronously and is packed on a thread.

The sampling thread never waits. What it hands over may be late: beyond `PENDING_BYTES` evaluations are left out.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from torch import Tensor

from .parts import Width
from .trace import LIMIT_BYTES, Evaluation

PENDING_BYTES = 64 << 20


class Watch:
    """Seconds from its making to `stop`: by the clock on the CPU, between two events on CUDA, unknown elsewhere."""

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        self._start = self._now()

    def stop(self) -> None:
        self._stop = self._now()

    def seconds(self) -> float | None:
        """Waits for the device, so this is for the recorder's thread alone."""
        if isinstance(self._start, torch.cuda.Event):
            self._stop.synchronize()
            return self._start.elapsed_time(self._stop) / 1000
        return self._stop - self._start if self._start is not None else None

    def _now(self) -> torch.cuda.Event | float | None:
        kind = self._device.type if self._device is not None else None
        if kind == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        return time.perf_counter() if kind == "cpu" else None


@dataclass(frozen=True)
class Marks:
    """What one forward computed: `mask` [blocks, rows, image tokens], to which nobody writes any more.

    `grid`: token rows and columns of the picture, and before them the number of frames where there are several. `cond`
    says of each row whether it is one. `widths` of the blocks; None: all heads and channel groups.
    """

    mask: Tensor
    grid: tuple[int, ...]
    cond: tuple[bool, ...]
    watch: Watch
    widths: Sequence[Width] | None = None


@dataclass(frozen=True)
class _Taken:
    """An evaluation on its way: `masks` [blocks, rows, tokens] give theirs once it has arrived. `size` is in bytes.

    `widths` are those of the first pass that was not dense, empty where all were.
    """

    size: int
    index: int
    sigma: float
    flops: float
    masks: Sequence[Callable[[], np.ndarray]]
    cond: Sequence[bool]
    grid: tuple[int, ...]
    widths: Sequence[Width]
    units: tuple[int, int] | None
    watches: Sequence[Watch]

    def pack(self) -> Evaluation:
        """Waits for the device, so this is for the recorder's thread alone."""
        masks = [arrive() for arrive in self.masks]
        tokens = min(mask.shape[2] for mask in masks)
        mask = masks[0] if len(masks) == 1 else np.concatenate([mask[:, :, :tokens] for mask in masks], axis=1)
        heads, groups = self._chosen(len(mask)) if self.units is not None else (None, None)
        seconds = [watch.seconds() for watch in self.watches]
        return Evaluation.of(self.index, self.sigma, self.flops, mask, self.cond, self.grid, heads, groups,
                             None if None in seconds else sum(seconds))

    def _chosen(self, blocks: int) -> tuple[np.ndarray, np.ndarray]:
        """Heads and channel groups [blocks, units] that were computed."""
        heads, groups = (np.ones((blocks, count), dtype=bool) for count in self.units)
        for block, width in enumerate(self.widths):
            for row, kept in ((heads[block], width.heads), (groups[block], width.groups)):
                if kept is not None:
                    row[:] = False
                    row[kept.numpy()] = True
        return heads, groups


class Recorder:
    """Takes an evaluation from the sampling thread and makes it an `Evaluation` on its own thread.

    `device`: where the model runs; without it an evaluation's seconds are unknown. A run that outgrows `limit` bytes
    keeps every second of its evaluations, then every fourth. `taken` counts all, `late` those left out to hold nothing up.
    """

    def __init__(self, on_evaluation: Callable[[Evaluation], None] | None = None, device: torch.device | None = None,
                 limit: int = LIMIT_BYTES) -> None:
        self.device, self.limit, self.taken, self.late = device, limit, 0, 0
        self.evaluations: list[Evaluation] = []
        self._on_evaluation, self._stride = on_evaluation, 1
        self._pending, self._lock = 0, threading.Lock()
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="dydit-trace", daemon=True)
        self._thread.start()

    def take(self, index: int, sigma: float, flops: float, passes: Sequence[Marks], units: tuple[int, int] | None = None) -> None:
        """One evaluation's passes. `units`: heads and channel groups of a block, where the method chooses among them."""
        self.taken += 1
        alike = _alike(passes)
        size = sum(marks.mask.numel() for marks in alike)
        with self._lock:
            if self._pending and self._pending + size > PENDING_BYTES:
                self.late += 1
                return
            self._pending += size
        # Not the passes themselves: they would hold their masks on the device until these are packed.
        widths = next((marks.widths for marks in alike if marks.widths is not None), ())
        self._queue.put(_Taken(size, index, sigma, flops, [_to_host(marks.mask) for marks in alike],
                               [is_cond for marks in alike for is_cond in marks.cond], alike[0].grid, widths, units,
                               [marks.watch for marks in passes]))

    def finish(self) -> tuple[Evaluation, ...]:
        """Wait for what was taken; the thread ends."""
        self._queue.put(None)
        self._thread.join()
        return tuple(self.evaluations)

    def _work(self) -> None:
        while (taken := self._queue.get()) is not None:
            size, evaluation = taken.size, taken.pack()
            del taken  # its masks, before the next is waited for
            self._keep(evaluation)
            self._tell(evaluation)
            with self._lock:
                self._pending -= size

    def _keep(self, evaluation: Evaluation) -> None:
        if evaluation.index % self._stride == 0:
            self.evaluations.append(evaluation)
        while len(self.evaluations) > 1 and sum(kept.nbytes for kept in self.evaluations) > self.limit:
            self._stride *= 2
            self.evaluations = [kept for kept in self.evaluations if kept.index % self._stride == 0]

    def _tell(self, evaluation: Evaluation) -> None:
        """A listener that fails loses its own map: the trace goes on."""
        try:
            if self._on_evaluation is not None:
                self._on_evaluation(evaluation)
        except Exception:
            logging.getLogger(__name__).exception("A map of computed tokens could not be shown")


def _alike(passes: Sequence[Marks]) -> list[Marks]:
    """Passes of the whole picture: a prompt that holds for an area has a grid of its own and is left out.

    They may still differ in reference images, which come after the picture.
    """
    picture = max((marks.grid for marks in passes), key=prod)
    return [marks for marks in passes if marks.grid == picture]


def _to_host(mask: Tensor) -> Callable[[], np.ndarray]:
    if mask.device.type != "cuda":
        return lambda: mask.cpu().numpy()
    host = torch.empty(mask.shape, dtype=mask.dtype, pin_memory=True).copy_(mask, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(mask.device))

    def arrive() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return arrive
