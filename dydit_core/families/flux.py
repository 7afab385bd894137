"""FLUX blocks run in parts, over whichever class holds them (ComfyUI's or `dydit_core.models.flux`).

Restated from the equations of FLUX.1 so that tokens can be left out: a double block skips the image MLP; a single
block skips a token's whole update, and with it the token's query, attention row and output columns (the token stays a
key and a value; DyDiT++ figure of the FLUX block, dead queries removed). Text is always computed.
At full capacity the result equals the block's own forward; a contract test holds this against the installed host.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import flops
from ..gather import gather, take_rows
from ..parts import Backend, BlockCost, Geometry, Kept, Pass

_DOUBLE_PARTS = ("img_mod", "txt_mod", "img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "img_attn", "txt_attn",
                 "img_mlp", "txt_mlp")
_SINGLE_PARTS = ("modulation", "pre_norm", "linear1", "linear2", "norm", "mlp_act")


class FluxFamily:
    name = "FLUX"

    def refusal(self, model: nn.Module) -> str | None:
        double, single = getattr(model, "double_blocks", None), getattr(model, "single_blocks", None)
        if not isinstance(double, nn.ModuleList) or not isinstance(single, nn.ModuleList) or not len(double):
            return f"{type(model).__name__} has no FLUX blocks (double_blocks and single_blocks)"
        for block, parts in [(double[0], _DOUBLE_PARTS), *((block, _SINGLE_PARTS) for block in single[:1])]:
            missing = [part for part in parts if getattr(block, part, None) is None]
            if missing:
                return f"{type(model).__name__} is a FLUX relative whose blocks lack {', '.join(missing)}"
        # Hunyuan Video and Hunyuan3D are built of the same blocks, around videos and meshes.
        if not (hasattr(model, "img_in") and hasattr(model, "txt_in") and isinstance(getattr(model, "patch_size", 2), int)):
            return f"{type(model).__name__} has FLUX blocks but does not take pictures as FLUX does (img_in, txt_in, square patches)"
        if not isinstance(double[0].img_mlp, nn.Sequential) or not isinstance(double[0].img_mlp[1], nn.GELU):
            return f"{type(model).__name__} has a gated MLP, which FLUX.1 has not"
        return None

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return [*model.double_blocks, *model.single_blocks]

    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        double = flops.flux_double(geometry)
        return [double] * len(model.double_blocks) + [
            flops.flux_single(geometry, backend.unsliceable(block.linear1) is None) for block in model.single_blocks
        ]

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        run = double_block if hasattr(block, "img_mlp") else single_block
        return run(block, index, current, backend, *args, **kwargs)


def _modulate(normed: Tensor, mod: Any, rows: slice = slice(None)) -> Tensor:
    return torch.addcmul(mod.shift[rows], normed, 1 + mod.scale[rows])


def _heads(x: Tensor, count: int, heads: int) -> Tensor:
    """[rows, tokens, count · width] to [count, rows, heads, tokens, head width]."""
    return x.unflatten(-1, (count, heads, -1)).permute(2, 0, 3, 1, 4)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def _parts(kept: Kept | None) -> tuple[tuple[slice, Tensor | None], ...]:
    return ((slice(None), None),) if kept is None else kept.parts


def double_block(block: nn.Module, index: int, current: Pass, backend: Backend, img: Tensor, txt: Tensor, vec: Tensor,
                 pe: Tensor, attn_mask: Tensor | None = None, modulation_dims_img: Any = None,
                 modulation_dims_txt: Any = None, transformer_options: dict | None = None) -> tuple[Tensor, Tensor]:
    """Joint attention and text MLP on everything, image MLP on the kept tokens."""
    _refuse_ranges(modulation_dims_img, modulation_dims_txt)
    img_mod1, img_mod2 = block.img_mod(vec)
    txt_mod1, txt_mod2 = block.txt_mod(vec)
    img_qkv = _heads(block.img_attn.qkv(_modulate(block.img_norm1(img), img_mod1)), 3, block.num_heads)
    txt_qkv = _heads(block.txt_attn.qkv(_modulate(block.txt_norm1(txt), txt_mod1)), 3, block.num_heads)
    img_q, img_k = block.img_attn.norm(*img_qkv)
    txt_q, txt_k = block.txt_attn.norm(*txt_qkv)
    q = backend.rotate(torch.cat((txt_q, img_q), dim=2), pe)
    k = backend.rotate(torch.cat((txt_k, img_k), dim=2), pe)
    v = torch.cat((txt_qkv[2], img_qkv[2]), dim=2)
    attn = backend.attention(q, k, v, attn_mask, transformer_options)
    txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)

    img = img + block.img_attn.proj(img_attn) * img_mod1.gate
    txt = txt + block.txt_attn.proj(txt_attn) * txt_mod1.gate
    img_normed, txt_normed = block.img_norm2(img), block.txt_norm2(txt)
    kept = current.select(index, img_normed, txt_normed, vec)
    values = []
    for rows, tokens in _parts(kept):
        chosen = img_normed[rows] if tokens is None else gather(img_normed[rows], tokens)
        values.append(block.img_mlp(_modulate(chosen, img_mod2, rows)))
    img = current.update(index, img, img_mod2.gate, kept, values)
    txt = txt + block.txt_mlp(_modulate(txt_normed, txt_mod2)) * txt_mod2.gate
    return img, _finite(txt)


def single_block(block: nn.Module, index: int, current: Pass, backend: Backend, x: Tensor, vec: Tensor, pe: Tensor,
                 attn_mask: Tensor | None = None, modulation_dims: Any = None,
                 transformer_options: dict | None = None) -> Tensor:
    """Keys and values from everything; queries, MLP and output for text and the kept image tokens."""
    _refuse_ranges(modulation_dims)
    text = current.text_tokens
    mod, _ = block.modulation(vec)
    normed = block.pre_norm(x)
    kept = current.select(index, normed[:, text:], normed[:, :text], vec)
    modulated = _modulate(normed, mod)
    if kept is None:
        outputs = [_single_dense(block, backend, modulated, pe, attn_mask, transformer_options)]
    else:
        outputs = _single_kept(block, backend, modulated, text, kept, pe, attn_mask, transformer_options)

    txt, img = x.split((text, x.shape[1] - text), dim=1)
    txt_values = outputs[0][:, :text] if len(outputs) == 1 else torch.cat([out[:, :text] for out in outputs])
    txt = txt + txt_values * mod.gate
    img = current.update(index, img, mod.gate, kept, [out[:, text:] for out in outputs])
    return _finite(torch.cat((txt, img), dim=1))


def _single_dense(block: nn.Module, backend: Backend, modulated: Tensor, pe: Tensor, mask: Tensor | None,
                  options: dict | None) -> Tensor:
    width = block.hidden_size
    qkv, mlp = block.linear1(modulated).split((3 * width, block.linear1.out_features - 3 * width), dim=-1)
    q, k, v = _heads(qkv, 3, block.num_heads)
    q, k = block.norm(q, k, v)
    attn = backend.attention(backend.rotate(q, pe), backend.rotate(k, pe), v, mask, options)
    return block.linear2(torch.cat((attn, block.mlp_act(mlp)), dim=2))


def _single_kept(block: nn.Module, backend: Backend, modulated: Tensor, text: int, kept: Kept, pe: Tensor,
                 mask: Tensor | None, options: dict | None) -> list[Tensor]:
    """Block output [rows, text + k, width] for each part of `kept`."""
    width, heads = block.hidden_size, block.num_heads
    chosen = [(rows, _with_text(tokens, text)) for rows, tokens in kept.parts]
    queries, hidden = [], []
    if backend.unsliceable(block.linear1) is None:
        with backend.weights(block.linear1, modulated) as (weight, bias):
            w_q, w_kv, w_mlp = weight.split((width, 2 * width, weight.shape[0] - 3 * width))
            b_q, b_kv, b_mlp = (None,) * 3 if bias is None else bias.split((width, 2 * width, w_mlp.shape[0]))
            k, v = _heads(F.linear(modulated, w_kv, b_kv), 2, heads)
            for rows, tokens in chosen:
                some = gather(modulated[rows], tokens)
                queries.append(_heads(F.linear(some, w_q, b_q), 1, heads)[0])
                hidden.append(F.linear(some, w_mlp, b_mlp))
    else:
        qkv, mlp = block.linear1(modulated).split((3 * width, block.linear1.out_features - 3 * width), dim=-1)
        q, k, v = _heads(qkv, 3, heads)
        for rows, tokens in chosen:
            queries.append(take_rows(q[rows], tokens, 2))
            hidden.append(gather(mlp[rows], tokens))

    k = backend.rotate(block.norm.key_norm(k).to(v), pe)
    outputs = []
    for (rows, tokens), q, mlp in zip(chosen, queries, hidden):
        table = take_rows(pe if pe.shape[0] == 1 else pe[rows], tokens, 2)
        q = backend.rotate(block.norm.query_norm(q).to(v), table)
        attn = backend.attention(q, k[rows], v[rows], _mask_rows(mask, rows, tokens), options)
        outputs.append(block.linear2(torch.cat((attn, block.mlp_act(mlp)), dim=2)))
    return outputs


def _with_text(tokens: Tensor, text: int) -> Tensor:
    """Indices into [text, image] of all text tokens and the image tokens `tokens` [rows, k]."""
    every = torch.arange(text, device=tokens.device).expand(tokens.shape[0], -1)
    return torch.cat((every, tokens + text), dim=1)


def _mask_rows(mask: Tensor | None, rows: slice, tokens: Tensor) -> Tensor | None:
    """An attention mask [queries, keys], [rows, queries, keys] or [rows, heads, queries, keys] for the kept queries.

    Any axis but the last may be 1.
    """
    if mask is None:
        return None
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask if mask.shape[0] == 1 else mask[rows]
    return mask if mask.shape[-2] == 1 else take_rows(mask, tokens, mask.ndim - 2)


def _refuse_ranges(*dims: Any) -> None:
    if any(dim is not None for dim in dims):
        raise ValueError(
            "DyDiT Budget: this graph modulates reference images at another timestep (index_timestep_zero), which "
            "token skipping does not support yet. Use another reference method, or set the budget to 1.0."
        )
