"""FLUX.1's blocks from their equations, everything computed and then masked: what skipping must equal.

Independent of the engine: rotary embedding by complex numbers, attention by a softmax, no shared helper.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor, pe: Tensor, mask: Tensor | None) -> Tensor:
    """[rows, tokens, width] from q, k, v [rows, heads, tokens, head width]; `mask` broadcasts to the scores."""
    turn = torch.complex(pe[..., 0, 0], pe[..., 1, 0])

    def rotate(x: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * turn).flatten(-2)

    scores = rotate(q) @ rotate(k).transpose(-1, -2) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    out = scores.softmax(-1) @ v
    return out.transpose(1, 2).flatten(2)


def qkv(linear_out: Tensor, heads: int, norm: nn.Module) -> list[Tensor]:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in linear_out.chunk(3, dim=-1))
    return [norm.query_norm(q), norm.key_norm(k), v]


def modulated(x: Tensor, mod) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + mod.scale) + mod.shift


def masked(x: Tensor, on: Tensor | None) -> Tensor:
    """`x` [rows, tokens, units · size] with zeros for the units that are off in `on` [units]."""
    return x if on is None else x * on.to(x).repeat_interleave(x.shape[-1] // len(on))


Widths = dict[int, tuple[Tensor | None, Tensor | None]]


def double(block: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None,
           heads: Tensor | None, groups: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image residual before its MLP, the MLP's output for every image token, its gate; and the text."""
    (i1, i2), (t1, t2) = block.img_mod(vec), block.txt_mod(vec)
    streams = [qkv(block.txt_attn.qkv(modulated(txt, t1)), block.num_heads, block.txt_attn.norm),
               qkv(block.img_attn.qkv(modulated(img, i1)), block.num_heads, block.img_attn.norm)]
    attn = masked(attention(*(torch.cat(pair, dim=2) for pair in zip(*streams)), pe, mask), heads)
    txt = txt + t1.gate * block.txt_attn.proj(attn[:, : txt.shape[1]])
    img = img + i1.gate * block.img_attn.proj(attn[:, txt.shape[1]:])
    txt = txt + t2.gate * block.txt_mlp(modulated(txt, t2))
    hidden = F.gelu(block.img_mlp[0](modulated(img, i2)), approximate="tanh")
    return img, block.img_mlp[2](masked(hidden, groups)), i2.gate, txt


def single(block: nn.Module, x: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None, heads: Tensor | None,
           groups: Tensor | None) -> tuple[Tensor, Tensor]:
    """The block's output for every token before the gate, and the gate."""
    mod, _ = block.modulation(vec)
    out = block.linear1(modulated(x, mod))
    width = x.shape[-1]
    attn = masked(attention(*qkv(out[..., : 3 * width], block.num_heads, block.norm), pe, mask), heads)
    hidden = masked(F.gelu(out[..., 3 * width:], approximate="tanh"), groups)
    return block.linear2(torch.cat((attn, hidden), dim=-1)), mod.gate


def forward(model: nn.Module, entering: tuple[Tensor, Tensor, Tensor, Tensor], computed: Tensor,
            history: dict[int, Tensor] | None = None, mask: Tensor | None = None, widths: Widths | None = None) -> Tensor:
    """Tokens after the last block when block b keeps the image tokens `computed` [blocks, rows, image tokens].

    Skipped tokens get nothing, or with `history` (kept up to date here) the unit's last output. `widths`: the heads
    and the channel groups (booleans) that a block computes.
    """
    widths = widths or {}
    img, txt, vec, pe = entering
    text = txt.shape[1]

    def unit(index: int, value: Tensor) -> Tensor:
        keep = computed[index][..., None]
        if history is None:
            return torch.where(keep, value, 0.0)
        history[index] = torch.where(keep, value, history.get(index, torch.zeros_like(value)))
        return history[index]

    for index, block in enumerate(model.double_blocks):
        img, value, gate, txt = double(block, img, txt, vec, pe, mask, *widths.get(index, (None, None)))
        img = img + gate * unit(index, value)
    x = torch.cat((txt, img), dim=1)
    for index, block in enumerate(model.single_blocks, len(model.double_blocks)):
        value, gate = single(block, x, vec, pe, mask, *widths.get(index, (None, None)))
        x = x + gate * torch.cat((value[:, :text], unit(index, value[:, text:])), dim=1)
    return x
