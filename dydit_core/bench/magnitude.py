"""Widths by the size of the weights, without training: the control that trained widths (TDW) must beat.

A head or a group of MLP channels counts as much as the norms of the rows that make it and the columns that read it, each
relative to the mean of its kind of layer over all blocks; small ones are left out first (Han et al., arXiv 1506.02626).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..models.flux import DoubleStreamBlock, Flux, SingleStreamBlock
from ..routers.width import WidthScores

GROUPS = 16  # as many as the demo's adapters have


def magnitude_widths(model: Flux, groups: int = GROUPS) -> WidthScores:
    """Logits [1, blocks, units], alike at all noise levels."""
    heads = _relative([_double_heads(block) for block in model.double_blocks], [_single_heads(block) for block in model.single_blocks])
    channels = _relative([_double_groups(block, groups) for block in model.double_blocks],
                         [_single_groups(block, groups) for block in model.single_blocks])
    return WidthScores(heads[None], channels[None]).requires_grad_(False)


def _relative(*kinds: Sequence[Tensor]) -> Tensor:
    """Norms [layers, units] of the blocks of each kind to one number [blocks, units] for each unit."""
    stacked = [torch.stack(list(blocks)) for blocks in kinds if blocks]
    return torch.cat([(norms / norms.mean((0, 2), keepdim=True)).mean(1) for norms in stacked])


def _double_heads(block: DoubleStreamBlock) -> Tensor:
    attentions = block.img_attn, block.txt_attn
    return torch.stack([norm for attention in attentions
                        for norm in (_rows(attention.qkv.weight, block.num_heads, 3), _columns(attention.proj.weight, block.num_heads))])


def _single_heads(block: SingleStreamBlock) -> Tensor:
    width, heads = block.hidden_size, block.num_heads
    return torch.stack([_rows(block.linear1.weight[: 3 * width], heads, 3), _columns(block.linear2.weight[:, :width], heads)])


def _double_groups(block: DoubleStreamBlock, groups: int) -> Tensor:
    return torch.stack([_rows(block.img_mlp[0].weight, groups), _columns(block.img_mlp[2].weight, groups)])


def _single_groups(block: SingleStreamBlock, groups: int) -> Tensor:
    width = block.hidden_size
    return torch.stack([_rows(block.linear1.weight[3 * width :], groups), _columns(block.linear2.weight[:, width:], groups)])


def _rows(weight: Tensor, units: int, fused: int = 1) -> Tensor:
    """Norm [units] of the outputs of each unit; `fused` projections lie one after the other."""
    return torch.linalg.vector_norm(weight.float().unflatten(0, (fused, units, -1)), dim=(0, 2, 3))


def _columns(weight: Tensor, units: int) -> Tensor:
    """Norm [units] of the weights that read each unit."""
    return _rows(weight.T, units)
