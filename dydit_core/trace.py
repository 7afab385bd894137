"""What was computed where: an immutable, bit-packed record of a run, in a bounded store.

Which tokens, heads and channel groups every block computed is kept bit by bit. The means that are asked for most often
(over the tokens, over the blocks) are taken once, when an evaluation is packed.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from math import prod

import numpy as np
import torch
from torch import Tensor

MAP_SIDE = 64
LIMIT_BYTES = 64 << 20
_MOST_SAID = 64
BRANCHES = ("cond", "uncond")


@dataclass(frozen=True, eq=False)
class Bits:
    """Booleans [..., length], eight to a byte along the last axis."""

    packed: np.ndarray
    length: int

    @classmethod
    def of(cls, values: np.ndarray) -> Bits:
        return cls(np.packbits(values, axis=-1), values.shape[-1])

    def values(self, first: int | slice = slice(None)) -> np.ndarray:
        """Booleans of all, or of these along the first axis."""
        return np.unpackbits(self.packed[first], axis=-1, count=self.length).view(bool)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One model evaluation. Its rows are the batch rows of all its passes, `cond` says of each whether it is one.

    `flops` is a fraction of the dense block FLOPs, `seconds` the time of its forwards, None where that is not known.
    `tokens` [blocks, rows, image tokens]: the picture's `frames` × `grid` tokens first, then those of reference images,
    which no mean and no map holds. `heads` and `groups` [blocks, units] are None where the method does not choose them.
    `kept` [branches, blocks] is the fraction of the picture's tokens that was computed, and `maps` [branches, frames,
    rows, columns] the fraction of the blocks that computed a place, at most 64 × 64: batch rows of a branch are averaged.
    """

    index: int
    sigma: float
    flops: float
    cond: tuple[bool, ...]
    frames: int
    grid: tuple[int, int]
    tokens: Bits
    kept: np.ndarray
    maps: np.ndarray
    heads: Bits | None = None
    groups: Bits | None = None
    seconds: float | None = None

    @classmethod
    def of(cls, index: int, sigma: float, flops: float, mask: np.ndarray, cond: Sequence[bool], grid: Sequence[int],
           heads: np.ndarray | None = None, groups: np.ndarray | None = None, seconds: float | None = None) -> Evaluation:
        """Packs booleans: `mask` [blocks, rows, image tokens], `heads` and `groups` [blocks, units].

        `grid`: token rows and columns, and before them the number of frames where there are several.
        """
        *frames, rows, columns = grid
        shape = prod(frames), rows, columns
        picture = mask[:, :, :prod(shape)]
        counts = np.count_nonzero(picture, axis=2)
        kept = np.stack([counts[:, of].mean(1) for of in _rows_of(cond).values()]) / prod(shape)
        return cls(index, sigma, flops, tuple(cond), shape[0], shape[1:], Bits.of(mask), kept.astype(np.float32),
                   _maps(picture, cond, shape).astype(np.float16), heads if heads is None else Bits.of(heads),
                   groups if groups is None else Bits.of(groups), seconds)

    @property
    def branches(self) -> tuple[str, ...]:
        """Those that were run, cond first."""
        return tuple(_rows_of(self.cond))

    @property
    def computed(self) -> float:
        """Fraction of the picture's tokens, mean over blocks and branches."""
        return float(self.kept.mean())

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, rows, image tokens."""
        return (*self.tokens.packed.shape[:2], self.tokens.length)

    @property
    def nbytes(self) -> int:
        packed = [bits.packed for bits in (self.tokens, self.heads, self.groups) if bits is not None]
        return sum(values.nbytes for values in (*packed, self.kept, self.maps))

    def mask(self) -> np.ndarray:
        """Booleans [blocks, rows, image tokens]: computed or not."""
        return self.tokens.values()

    def map(self, block: int | None = None, branch: str | None = None) -> np.ndarray:
        """Fraction computed [frames, rows, columns] at each place, at most 64 × 64; None is the mean over all of them."""
        maps = self.maps if block is None else self._maps_of(block)
        return (maps if branch is None else maps[[self.branches.index(branch)]]).mean(0, dtype=np.float32)

    def mean_map(self) -> np.ndarray:
        """Fraction computed [rows, columns], mean over blocks, branches and frames."""
        return self.map().mean(0)

    def _maps_of(self, block: int) -> np.ndarray:
        shape = self.frames, *self.grid
        return _maps(self.tokens.values(slice(block, block + 1))[:, :, :prod(shape)], self.cond, shape)


def _rows_of(cond: Sequence[bool]) -> dict[str, list[int]]:
    rows = {name: [row for row, is_cond in enumerate(cond) if is_cond == (name == BRANCHES[0])] for name in BRANCHES}
    return {name: of for name, of in rows.items() if of}


def _maps(picture: np.ndarray, cond: Sequence[bool], shape: tuple[int, int, int]) -> np.ndarray:
    """Mean over blocks and a branch's rows [branches, frames, rows, columns] of booleans [blocks, rows, tokens]."""
    # Bytes are added many at a time, and sixteen times as fast as booleans are averaged.
    counts = np.add.reduce(picture.view(np.uint8), 0, dtype=np.uint8 if len(picture) < 256 else np.uint32)
    means = np.stack([counts[of].mean(0, dtype=np.float32) for of in _rows_of(cond).values()]) / len(picture)
    return _shrink(_shrink(means.reshape(-1, *shape), 2), 3)


def _shrink(maps: np.ndarray, axis: int) -> np.ndarray:
    """Mean over neighbours until the axis is no longer than a map's side."""
    size = maps.shape[axis]
    if size <= MAP_SIDE:
        return maps
    return np.add.reduceat(maps, _starts(size), axis) / _widths(size).reshape(-1, *[1] * (maps.ndim - axis - 1))


def _starts(size: int) -> np.ndarray:
    """The first token of each cell along a side of the picture."""
    cells = min(size, MAP_SIDE)
    return np.arange(cells) * size // cells


def _widths(size: int) -> np.ndarray:
    return np.diff(np.append(_starts(size), size))


def mean_of(shown: np.ndarray, grid: tuple[int, int]) -> float:
    """The mean over the tokens of the picture, of a map [..., rows, columns] whose cells may hold unequally many."""
    return float(np.average(shown, weights=np.broadcast_to(np.outer(*map(_widths, grid)), shown.shape)))


@dataclass(frozen=True)
class Trace:
    """A finished run. `facts` are what the run was asked and what it spent, ready for JSON; `blocks` their names.

    `config` is the id of the settings that the MODEL carried, empty where nothing was run, `fingerprints` are those of the latents that came of it.
    """

    run: str
    facts: dict
    evaluations: tuple[Evaluation, ...]
    blocks: tuple[str, ...] = ()
    config: str = ""
    fingerprints: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(evaluation.nbytes for evaluation in self.evaluations)

    @property
    def branches(self) -> tuple[str, ...]:
        """Those that any evaluation ran, cond first."""
        return tuple(name for name in BRANCHES if any(name in evaluation.branches for evaluation in self.evaluations))

    @property
    def whole(self) -> list[Evaluation]:
        """Evaluations of the whole picture: one in which only prompts for an area were run holds no more than that area."""
        most = max((prod(evaluation.grid) for evaluation in self.evaluations), default=0)
        return [evaluation for evaluation in self.evaluations if prod(evaluation.grid) == most]

    def at(self, step: int) -> Evaluation:
        """LookupError says which steps there are."""
        found = next((evaluation for evaluation in self.evaluations if evaluation.index == step), None)
        if found is None:
            raise LookupError(f"There is no map of step {step}: {self._steps()}.")
        return found

    def map(self, step: int | None = None, block: int | None = None, branch: str | None = None, frame: int | None = None) -> np.ndarray:
        """One of `maps` [rows, columns], None for the mean over the frames."""
        maps = self.maps(step, block, branch)
        if frame is not None and not 0 <= frame < len(maps):
            raise LookupError(f"There is no frame {frame}: there are {len(maps)}, counted from 0.")
        return maps.mean(0) if frame is None else maps[frame]

    def maps(self, step: int | None = None, block: int | None = None, branch: str | None = None) -> np.ndarray:
        """Fraction computed [frames, rows, columns] at each place, at most 64 × 64 in a frame; None is the mean over all of them.

        A step is an evaluation's index. LookupError says what there is.
        """
        chosen = self.whole if step is None else [self.at(step)]
        if not chosen:
            raise LookupError(f"There is no map: {self._steps()}.")
        if block is not None and not 0 <= block < chosen[0].shape[0]:
            raise LookupError(f"There is no block {block}: this model has the blocks 0 to {chosen[0].shape[0] - 1}.")
        maps = [evaluation.map(block, branch) for evaluation in chosen if branch is None or branch in evaluation.branches]
        if not maps:
            there = self.branches if step is None else chosen[0].branches
            raise LookupError(f"There is no such branch here: there is {' and '.join(there)}.")
        return np.mean(maps, axis=0)

    def _steps(self) -> str:
        indices = [evaluation.index for evaluation in self.evaluations]
        if not indices:
            return "nothing was recorded in this run"
        gaps = "" if len(indices) == indices[-1] - indices[0] + 1 else f", {len(indices)} in all"
        return f"this run has the steps {indices[0]} to {indices[-1]}{gaps}"


def fingerprint(samples: Tensor) -> str:
    """Of a latent, to know it again: the same on any device and in any type from float16 up."""
    # The host may hand float16 to the next node where the sampler gave float32.
    values = samples.detach().to("cpu", torch.float16).contiguous()
    digest = blake2b(repr(tuple(values.shape)).encode(), digest_size=16)
    digest.update(values.numpy())
    return digest.hexdigest()


class TraceStore:
    """The last runs, newest last: at most `runs` of them and `max_bytes` together. Thread-safe.

    Of a run that is larger by itself only the facts are kept. What a node said without a run takes no run's place; of that
    the last `_MOST_SAID`.
    """

    def __init__(self, runs: int = 8, max_bytes: int = LIMIT_BYTES) -> None:
        self.runs, self.max_bytes = runs, max_bytes
        self._traces: OrderedDict[str, Trace] = OrderedDict()
        self._lock = threading.Lock()

    @property
    def nbytes(self) -> int:
        with self._lock:
            return self._bytes()

    def put(self, trace: Trace) -> None:
        if trace.nbytes > self.max_bytes:
            trace = replace(trace, evaluations=())
        with self._lock:
            self._traces.pop(trace.run, None)
            self._traces[trace.run] = trace
            for kind, most in ((True, self.runs), (False, _MOST_SAID)):
                of_kind = [run for run, trace in self._traces.items() if bool(trace.config) == kind]
                for run in of_kind[:max(0, len(of_kind) - most)]:
                    del self._traces[run]
            while self._bytes() > self.max_bytes:
                self._traces.popitem(last=False)

    def get(self, run: str) -> Trace | None:
        with self._lock:
            return self._traces.get(run)

    def find(self, config: str, fingerprint: str) -> Trace | None:
        """The newest run under these settings that gave this latent."""
        return next((trace for trace in self.newest_first() if trace.config == config and fingerprint in trace.fingerprints), None)

    def gave(self, fingerprint: str) -> bool:
        """Whether a run under any settings gave this latent."""
        return any(fingerprint in trace.fingerprints and trace.evaluations for trace in self.newest_first())

    def newest_first(self) -> list[Trace]:
        with self._lock:
            return list(reversed(self._traces.values()))

    def _bytes(self) -> int:
        return sum(trace.nbytes for trace in self._traces.values())
