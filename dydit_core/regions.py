"""Parts of the picture or video that the artist marked: tokens that are always computed, and tokens that go before others.

A mask is brought to the grid of tokens. A token is protected where any pixel of it is more than half white; it is
preferred as much as its pixels are white on average.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor
from torch.nn import functional as F

# A white token is moved this much of the way to the top of the router's order. Others that the router puts at the very top
# still pass: what is never computed again falls apart.
_NEARER = 0.75


@dataclass(frozen=True, eq=False)
class Regions:
    """Masks [n, height, width] on the CPU, 0 … 1, or None.

    n is 1, the frames of a video, or those of all videos of a batch, one after the other; a picture is a video of one frame.
    """

    protect: Tensor | None = None
    prefer: Tensor | None = None

    def __bool__(self) -> bool:
        return self.protect is not None or self.prefer is not None

    def on(self, grid: tuple[int, ...], image_tokens: int) -> Zones:
        """The masks on a picture of `grid` token rows and columns, before which a video has its frames; what is beyond it
        (reference images) is not marked."""
        def tokens(mask: Tensor, pool: type) -> Tensor:
            frames = pool(mask[:, None].float(), grid[-2:])
            if len(frames) == 1:
                frames = frames.repeat(prod(grid[:-2]), 1, 1, 1)
            marked = frames.reshape(-1, prod(grid))
            return F.pad(marked, (0, image_tokens - prod(grid)))

        protect = None if self.protect is None else tokens(self.protect, F.adaptive_max_pool2d) > 0.5
        return Zones(protect, None if self.prefer is None else tokens(self.prefer, F.adaptive_avg_pool2d))


@dataclass(eq=False)
class Zones:
    """`protect` (booleans) and `prefer` (0 … 1) of the image tokens [pictures or 1, image tokens], on the CPU."""

    protect: Tensor | None = None
    prefer: Tensor | None = None
    _placed: dict[torch.device, tuple[Tensor | None, Tensor | None]] = field(default_factory=dict)

    @property
    def least(self) -> int:
        """Most protected tokens of a picture: as all pictures of a batch compute equally many, the least of each."""
        return 0 if self.protect is None else int(self.protect.sum(1).max())

    def order(self, scores: Tensor, by_threshold: bool) -> Tensor:
        """`scores` [rows, image tokens] with the zones in them. `by_threshold`: those above 0 are computed, so preference
        means nothing."""
        protect, prefer = self._at(scores.device)
        if prefer is not None and not by_threshold:
            place = scores.argsort(dim=1).argsort(dim=1).to(scores.dtype) / scores.shape[1]
            scores = (place - 1.0) * (1.0 - _NEARER * _of_rows(prefer, len(scores)))
        return scores if protect is None else scores.masked_fill(_of_rows(protect, len(scores)), torch.inf)

    def _at(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        if device not in self._placed:
            self._placed[device] = tuple(mask if mask is None else mask.to(device) for mask in (self.protect, self.prefer))
        return self._placed[device]


def _of_rows(mask: Tensor, rows: int) -> Tensor:
    """A mask for each batch row: the pictures of one branch, then those of the next."""
    return mask if len(mask) == 1 else mask.repeat(rows // len(mask), 1)
