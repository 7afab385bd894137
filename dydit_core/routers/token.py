"""Learned scores of tokens (SDT), small.

DyDiT++ (arXiv 2504.06803) routes FLUX tokens by a LayerNorm, a modulation by the timestep and text condition, and a
linear score, plus the mean of the text: 38 M parameters a block. Here the modulation is low-rank and folded into the
score, so that one product per token is left:

    logit_i = LN(x_i) · (w + U tanh(D c)) + mean_text(LN(t)) · v + a · tanh(D c) + b + s log(ε + change_i),     c = SiLU(condition)

The second term is there where the blocks run on text, the last where skipped tokens reuse: how far a token's input has moved
since it was computed (see `sketch`).
A token is computed where its logit, plus one shift for the whole file, is positive. Which shift meets a budget is read
from a table of logit quantiles (block × sigma bin), so capacities are known before the forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..parts import Gate
from .sketch import channels

# Of the squared change: what moves less than this has not moved.
_STILL = 0.01


class TokenScores(nn.Module):
    """Router weights of all gated blocks: [blocks, …] tensors, in float32.

    `stale`: a token's change counts. `text`: the model's blocks run on text too, and its mean counts.
    """

    def __init__(self, blocks: int, width: int, rank: int = 16, bias: float = 2.0, stale: bool = False, text: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(blocks, width) * 0.02)
        self.text = nn.Parameter(torch.zeros(blocks, width)) if text else None
        self.down = nn.Parameter(torch.randn(blocks, rank, width) * width**-0.5)
        self.up = nn.Parameter(torch.zeros(blocks, width, rank))
        self.slope = nn.Parameter(torch.zeros(blocks, rank))
        self.bias = nn.Parameter(torch.full((blocks,), bias))
        self.stale = nn.Parameter(torch.full((blocks,), 0.5)) if stale else None

    @property
    def blocks(self) -> int:
        return self.weight.shape[0]

    def flops(self, image_tokens: int) -> float:
        """Products of one block's decision for one batch row."""
        rank, width = self.down.shape[1:]
        sketched = 2.0 * image_tokens * channels(width) if self.stale is not None else 0.0
        return 2.0 * width * (image_tokens + 2 * rank + (self.text is not None)) + 2.0 * rank + sketched

    def copy_to(self, device: torch.device) -> TokenScores:
        """An adapter's own scores stay where they are: another run may use them on another device."""
        blocks, rank, width = self.down.shape
        with torch.device("meta"):
            placed = TokenScores(blocks, width, rank, stale=self.stale is not None, text=self.text is not None)
        placed.load_state_dict({key: value.to(device) for key, value in self.state_dict().items()}, assign=True)
        return placed.requires_grad_(False)

    def forward(self, gate: Gate, change: Tensor | None = None) -> Tensor:
        """Logits [rows, tokens], float32, at a gate and, where it counts, with the `change` [rows, tokens] of its tokens."""
        block, normed = gate.block, gate.normed
        mixed = torch.tanh(F.silu(gate.condition.float()) @ self.down[block].T)
        score = self.weight[block] + mixed @ self.up[block].T
        offset = mixed @ self.slope[block] + self.bias[block]
        if self.text is not None:
            offset = offset + gate.normed_text.float().mean(1) @ self.text[block]
        logits = torch.bmm(normed, score.to(normed.dtype)[..., None])[..., 0].float() + offset[:, None]
        return logits if self.stale is None else logits + self.stale[block] * torch.log(change + _STILL)


@dataclass(frozen=True, eq=False)
class CapacityTable:
    """Logit quantiles [blocks, sigma bins, levels], rising along the levels, at evenly spaced probabilities 0…1.

    Bin `i` holds sigmas up to `edges[i]` (rising; the last edge is the highest sigma).
    """

    quantiles: Tensor
    edges: Tensor

    def at(self, sigmas: Tensor) -> Tensor:
        """Quantiles [S, blocks, levels] at `sigmas` [S], in float64."""
        bins = torch.bucketize(sigmas.double(), self.edges.double()).clamp(max=len(self.edges) - 1)
        return self.quantiles.movedim(1, 0)[bins].double().contiguous()

    @property
    def span(self) -> tuple[float, float]:
        """Shifts at which no token and every token is kept."""
        return -float(self.quantiles.max()) - 1.0, -float(self.quantiles.min()) + 1.0


def fraction_above(quantiles: Tensor, edge: Tensor) -> Tensor:
    """Fraction [...] of values above `edge` [...] where `quantiles` [..., levels] are theirs, rising."""
    levels = quantiles.shape[-1]
    edge = edge[..., None].contiguous()
    above = torch.searchsorted(quantiles, edge, right=True)
    low = quantiles.gather(-1, (above - 1).clamp(0, levels - 1))
    high = quantiles.gather(-1, above.clamp(0, levels - 1))
    inside = ((edge - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)
    return 1.0 - ((above - 1 + inside) / (levels - 1)).clamp(0, 1)[..., 0]
