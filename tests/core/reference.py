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


def double(block: nn.Module, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor,
           mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Image residual before its MLP, the MLP's output for every image token, its gate; and the text."""
    (i1, i2), (t1, t2) = block.img_mod(vec), block.txt_mod(vec)
    streams = [qkv(block.txt_attn.qkv(modulated(txt, t1)), block.num_heads, block.txt_attn.norm),
               qkv(block.img_attn.qkv(modulated(img, i1)), block.num_heads, block.img_attn.norm)]
    attn = attention(*(torch.cat(pair, dim=2) for pair in zip(*streams)), pe, mask)
    txt = txt + t1.gate * block.txt_attn.proj(attn[:, : txt.shape[1]])
    img = img + i1.gate * block.img_attn.proj(attn[:, txt.shape[1]:])
    txt = txt + t2.gate * block.txt_mlp(modulated(txt, t2))
    return img, block.img_mlp(modulated(img, i2)), i2.gate, txt


def single(block: nn.Module, x: Tensor, vec: Tensor, pe: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The block's output for every token before the gate, and the gate."""
    mod, _ = block.modulation(vec)
    out = block.linear1(modulated(x, mod))
    width = x.shape[-1]
    attn = attention(*qkv(out[..., : 3 * width], block.num_heads, block.norm), pe, mask)
    return block.linear2(torch.cat((attn, F.gelu(out[..., 3 * width:], approximate="tanh")), dim=-1)), mod.gate


def forward(model: nn.Module, entering: tuple[Tensor, Tensor, Tensor, Tensor], computed: Tensor,
            history: dict[int, Tensor] | None = None, mask: Tensor | None = None) -> Tensor:
    """Tokens after the last block when block b keeps the image tokens `computed` [blocks, rows, image tokens].

    Skipped tokens get nothing, or with `history` (kept up to date here) the unit's last output.
    """
    img, txt, vec, pe = entering
    text = txt.shape[1]

    def unit(index: int, value: Tensor) -> Tensor:
        keep = computed[index][..., None]
        if history is None:
            return torch.where(keep, value, 0.0)
        history[index] = torch.where(keep, value, history.get(index, torch.zeros_like(value)))
        return history[index]

    for index, block in enumerate(model.double_blocks):
        img, value, gate, txt = double(block, img, txt, vec, pe, mask)
        img = img + gate * unit(index, value)
    x = torch.cat((txt, img), dim=1)
    for index, block in enumerate(model.single_blocks, len(model.double_blocks)):
        value, gate = single(block, x, vec, pe, mask)
        x = x + gate * torch.cat((value[:, :text], unit(index, value[:, text:])), dim=1)
    return x
