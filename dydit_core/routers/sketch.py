"""How much image tokens changed since they were last computed, from a sketch of their normed inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..kept import Kept
from ..memory import PerBlock, join, rows_of
from ..parts import Extent, Gate

SKETCH_CHANNELS = 64


def sketch(normed: Tensor) -> Tensor:
    """Every n-th channel [rows, tokens, ≤ 64]."""
    return normed[..., :: _every(normed.shape[-1])]


def channels(width: int) -> int:
    return len(range(0, width, _every(width)))


def _every(width: int) -> int:
    return -(-width // SKETCH_CHANNELS)


@dataclass(eq=False)
class Sketches:
    """Per block the sketch [rows, image tokens, ≤ 64] of each token's input when it was last computed."""

    held: PerBlock = field(default_factory=dict)

    def change(self, gate: Gate) -> Tensor:
        """Squared distance [rows, image tokens], float32; from zero for what was never computed."""
        now = sketch(gate.normed)
        before = self.held.get(gate.block)
        return (now if before is None else now - before).float().square().sum(-1)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        now = sketch(gate.normed)
        if kept is None:
            self.held[gate.block] = now.clone(memory_format=torch.contiguous_format)
            return
        if gate.block not in self.held:
            self.held[gate.block] = torch.zeros_like(now, memory_format=torch.contiguous_format)
        kept.put_(self.held[gate.block], kept.take(now))

    def clear(self) -> None:
        self.held.clear()

    def rows(self, part: slice) -> Sketches:
        return Sketches(rows_of(self.held, part))

    def joined(self, others: Sequence[Sketches]) -> Sketches:
        return Sketches(join([one.held for one in (self, *others)]))


def row_bytes(extent: Extent) -> int:
    """Of the sketches of one batch row."""
    return extent.blocks * extent.geometry.image_tokens * channels(extent.geometry.width) * extent.element_size
