"""Learned widths (TDW): which heads and MLP channel groups each block computes at a noise level.

DyDiT (arXiv 2410.03456 §3.2) decides by a linear layer on the timestep embedding, one for heads and one for channel
groups in each block. A function of the timestep alone is a function of one number, so here it is kept as that: logits
at evenly spaced noise levels with straight lines between them. A unit is computed where its logit, plus the file's one
shift, is positive; the unit with the highest logit always is.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parts import Width
from ..td_lora import between


class WidthScores(nn.Module):
    """Logits [knots, blocks, units] of heads and of channel groups, in float32; knots evenly spaced on noise level 0 … 1."""

    def __init__(self, heads: Tensor, groups: Tensor) -> None:
        super().__init__()
        self.heads, self.groups = nn.Parameter(heads), nn.Parameter(groups)

    @property
    def blocks(self) -> int:
        return self.heads.shape[1]

    def forward(self, levels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [S, blocks, heads] and [S, blocks, groups] at the noise's shares `levels` [S] (see `blocks.Family.level`)."""
        return between(self.heads, levels), between(self.groups, levels)


def new_width_scores(blocks: int, heads: int, groups: int, knots: int = 9, spread: float = 0.1) -> WidthScores:
    """Untrained: every unit undecided (logits around 0), and alike at all noise levels."""
    return WidthScores(*((spread * torch.randn(1, blocks, units)).repeat(knots, 1, 1) for units in (heads, groups)))


def kept(logits: Tensor, shift: float) -> Tensor:
    """Booleans like `logits` [..., units]: above −shift, and always the highest."""
    return (logits > -shift).scatter(-1, logits.argmax(-1, keepdim=True), True)


def fraction_kept(ranked: Tensor, shift: float) -> Tensor:
    """The mean [...] of `kept` where `ranked` [..., units] are the logits, rising."""
    below = torch.searchsorted(ranked, ranked.new_full((*ranked.shape[:-1], 1), -shift), right=True)[..., 0]
    return (1.0 - below.double() / ranked.shape[-1]).clamp(min=1.0 / ranked.shape[-1])


def widths(heads: Tensor, groups: Tensor) -> list[Width]:
    """Per block the kept units of `heads` [blocks, heads] and `groups` [blocks, groups], booleans on the CPU."""
    return [Width(_some(head), _some(group), len(head), len(group)) for head, group in zip(heads, groups)]


def _some(chosen: Tensor) -> Tensor | None:
    return None if bool(chosen.all()) else chosen.nonzero()[:, 0]
