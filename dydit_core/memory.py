"""What a router or a substitute holds between evaluations, when its batch rows are split up or put together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PerBlock = dict[int, Tensor]


def rows_of(held: PerBlock, part: slice) -> PerBlock:
    """Views [part, …] of the tensors [rows, …] held for each block."""
    return {block: tensor[part] for block, tensor in held.items()}


def join(held: Sequence[PerBlock]) -> PerBlock:
    """Rows under one another, of the blocks that all hold. They are emptied on the way: one block at a time is held twice."""
    blocks = set.intersection(*map(set, held))
    return {block: torch.cat([one.pop(block) for one in held]) if len(held) > 1 else held[0][block] for block in blocks}


class Rowless:
    """A memory, of a router or a substitute, in which nothing belongs to a batch row or follows the picture."""

    def rows(self, part: slice) -> Rowless:
        return self

    def joined(self, others: Sequence[Rowless]) -> Rowless:
        return self

    def reset(self) -> None:
        return None
