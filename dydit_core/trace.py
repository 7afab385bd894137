"""What was computed where: an immutable, bit-packed record of a run, in a bounded store.

Recording never waits for the model: masks leave the device asynchronously and are packed on a thread.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

MAP_SIDE = 64


@dataclass(frozen=True)
class Evaluation:
    """One model evaluation: `bits` packs the mask [blocks, branch rows, image tokens], `shape` is that shape.

    `flops` and `computed` are fractions of dense block FLOPs and of image tokens.
    """

    index: int
    sigma: float
    flops: float
    computed: float
    shape: tuple[int, int, int]
    bits: np.ndarray
    grid: tuple[int, int]

    def mask(self) -> np.ndarray:
        """Booleans [blocks, branch rows, image tokens]: computed or not."""
        count = int(np.prod(self.shape))
        return np.unpackbits(self.bits, count=count).reshape(self.shape).astype(bool)

    def mean_map(self) -> np.ndarray:
        """Fraction of (block, branch row) in which each token of the picture was computed, at most 64 × 64."""
        rows, columns = self.grid
        tokens = self.mask()[:, :, : rows * columns].mean((0, 1)).reshape(rows, columns)
        return _shrink(_shrink(tokens, 0), 1)


def _shrink(picture: np.ndarray, axis: int) -> np.ndarray:
    """Mean over neighbours until the axis is no longer than a map's side."""
    size = picture.shape[axis]
    if size <= MAP_SIDE:
        return picture
    starts = np.arange(MAP_SIDE) * size // MAP_SIDE
    counts = np.diff(np.append(starts, size))
    return np.add.reduceat(picture, starts, axis) / np.expand_dims(counts, 1 - axis)


@dataclass(frozen=True)
class Trace:
    """A finished run. `facts` are what the run was asked and what it spent, ready for JSON."""

    run: str
    facts: dict
    evaluations: tuple[Evaluation, ...]

    @property
    def nbytes(self) -> int:
        return sum(evaluation.bits.nbytes for evaluation in self.evaluations)


class TraceStore:
    """The last runs, newest last: at most `runs` of them and `max_bytes` together. Thread-safe."""

    def __init__(self, runs: int = 8, max_bytes: int = 64 << 20) -> None:
        self.runs, self.max_bytes = runs, max_bytes
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._lock = threading.Lock()

    def put(self, trace: Trace) -> None:
        with self._lock:
            self._traces.pop(trace.run, None)
            self._traces[trace.run] = trace
            while len(self._traces) > self.runs or (len(self._traces) > 1 and self._bytes() > self.max_bytes):
                self._traces.popitem(last=False)

    def get(self, run: str) -> Trace | None:
        with self._lock:
            return self._traces.get(run)

    def newest_first(self) -> list[Trace]:
        with self._lock:
            return list(reversed(self._traces.values()))

    def _bytes(self) -> int:
        return sum(trace.nbytes for trace in self._traces.values())


class Recorder:
    """Takes masks from the sampling thread and turns them into `Evaluation`s on its own thread."""

    def __init__(self, on_evaluation: Callable[[Evaluation], None] | None = None) -> None:
        self.evaluations: list[Evaluation] = []
        self._on_evaluation = on_evaluation
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="dydit-trace", daemon=True)
        self._thread.start()

    def take(self, index: int, sigma: float, flops: float, masks: list[Tensor], grid: tuple[int, int]) -> None:
        """Masks [blocks, rows, image tokens] of one evaluation's passes; the caller no longer writes to them."""
        self._queue.put((index, sigma, flops, [_to_host(mask) for mask in masks], grid))

    def finish(self) -> tuple[Evaluation, ...]:
        """Wait for what was taken; the thread ends."""
        self._queue.put(None)
        self._thread.join()
        return tuple(self.evaluations)

    def _work(self) -> None:
        while (item := self._queue.get()) is not None:
            index, sigma, flops, hosts, grid = item
            mask = np.concatenate([arrive() for arrive in hosts], axis=1)
            evaluation = Evaluation(index, sigma, flops, float(mask.mean()), mask.shape, np.packbits(mask), grid)
            self.evaluations.append(evaluation)
            self._tell(evaluation)

    def _tell(self, evaluation: Evaluation) -> None:
        """A listener that fails loses its own map: the trace goes on."""
        try:
            if self._on_evaluation is not None:
                self._on_evaluation(evaluation)
        except Exception:
            logging.getLogger(__name__).exception("A map of computed tokens could not be shown")


def _to_host(mask: Tensor) -> Callable[[], np.ndarray]:
    if mask.device.type != "cuda":
        return lambda: mask.cpu().numpy()
    host = torch.empty(mask.shape, dtype=mask.dtype, pin_memory=True).copy_(mask, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()

    def arrive() -> np.ndarray:
        copied.synchronize()
        return host.numpy()

    return arrive
