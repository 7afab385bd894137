"""What the published DyDiT forward computes in a block of a DiT or Latte, for comparison (DyDiT, arXiv 2410.03456).

All of it: every head, channel group and token, and then it multiplies what was decided against by zero. Written from
the description of the method, with a fused attention in place of the published matrix of weights, so that only the masks
differ from a dense forward. The same decisions give the same output as ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks import Backend, Pass
from ..families.dit import DiTFamily
from ..models.dit import modulate
from ..parts import BlockCost, Gate, Geometry


@dataclass(frozen=True)
class MaskingFamily:
    """A `blocks.Family` that is `family` in all but how blocks run and what that costs."""

    family: DiTFamily

    def __getattr__(self, name: str) -> Any:
        return getattr(self.family, name)

    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        """Nothing that is decided saves anything."""
        return [BlockCost(fixed=cost.at(geometry.image_tokens)) for cost in self.family.costs(model, geometry, backend)]

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, x: Tensor, condition: Tensor,
                transformer_options: dict | None = None) -> Tensor:
        width, heads = current.width(index), block.num_heads
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        qkv = block.attn.qkv(modulate(block.norm1(x), shift1, scale1))
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        attn = block.attend(backend.attention, q, k, v, transformer_options)
        x = torch.addcmul(x, gate1, block.attn.proj(_masked(attn, width.heads, heads)))

        kept = current.select(Gate(index, current.sigma, x, condition, lambda: block.norm2(x)))
        hidden = block.mlp.fc1(modulate(block.norm2(x), shift2, scale2))
        values = block.mlp.fc2(F.gelu(_masked(hidden, width.groups, max(1, width.group_count)), approximate="tanh"))
        if kept is not None:
            mask = values.new_zeros(*values.shape[:2], 1)
            values = values * kept.put_(mask, mask.new_ones(*kept.index.shape, 1))
        return torch.addcmul(x, gate2, values)


def _masked(x: Tensor, units: Tensor | None, count: int) -> Tensor:
    """`x` [rows, tokens, count · size] times 1 where its unit is among `units`, times 0 elsewhere."""
    if units is None:
        return x
    mask = torch.zeros(count)
    mask[units] = 1.0
    return x * mask.repeat_interleave(x.shape[-1] // count).to(x)
