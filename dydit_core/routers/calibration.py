"""How a router's logits are spread, per block and noise level: collected while it decides, then a capacity table."""

from __future__ import annotations

import torch
from torch import Tensor

from .token import CapacityTable

BINS, LEVELS = 10, 33
# torch refuses quantiles of more numbers.
MOST = 2**24


class Seen:
    """Logits of `blocks` blocks, in `bins` equal ranges of the noise's share in the mixture."""

    def __init__(self, blocks: int, bins: int = BINS) -> None:
        self._edges = torch.linspace(0, 1, bins + 1)[1:]
        self._found: list[list[list[Tensor]]] = [[[] for _ in range(blocks)] for _ in range(bins)]

    def put(self, block: int, levels: Tensor, logits: Tensor) -> None:
        """Those of `block` [rows, tokens], where noise has the share `levels` [rows], 0…1."""
        places = torch.bucketize(levels.cpu().contiguous(), self._edges).clamp(max=len(self._edges) - 1)
        for place, row in zip(places.tolist(), logits.detach().cpu()):
            self._found[place][block].append(row)

    @property
    def count(self) -> int:
        """Logits seen of each block."""
        return sum(row.numel() for found in self._found for row in found[0])

    def table(self, highest: float | None = None) -> CapacityTable:
        """Their quantiles; a range in which none was seen has those of the nearest.

        `highest`: the highest sigma of a model that counts noise by its ratio to the picture; None where sigmas are shares.
        """
        levels, filled = torch.linspace(0, 1, LEVELS), [place for place, found in enumerate(self._found) if found[0]]
        nearest = [min(filled, key=lambda other: abs(other - place)) for place in range(len(self._found))]
        quantiles = torch.stack([torch.stack([torch.cat(block).quantile(levels) for block in self._found[place]]) for place in nearest], dim=1)
        return CapacityTable(quantiles.contiguous(), self._edges if highest is None else _as_sigmas(self._edges, highest))


def _as_sigmas(levels: Tensor, highest: float) -> Tensor:
    """Those of the shares of noise `levels`; nothing is above `highest`."""
    return (levels / (1 - levels).clamp(min=1e-9)).clamp(max=highest)
