"""FLUX blocks run in parts, over whichever class holds them (ComfyUI's or `dydit_core.models.flux`).

Restated from the equations of FLUX.1 so that tokens can be left out: a double block skips the image MLP; a single
block skips a token's whole update, and with it the token's query, attention row and output columns (the token stays a
key and a value; DyDiT++ figure of the FLUX block, dead queries removed). Text is always computed. Where a block runs at
less than full width, heads and MLP channel groups are cut out of the weights (see `linear`).
At full capacity the result equals the block's own forward; a contract test holds this against the installed host.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .. import flops
from ..blocks import Backend, Pass
from ..gather import gather, take_lines, take_rows
from ..models.flux import timestep_embedding
from ..parts import FULL_WIDTH, BlockCost, Gate, Geometry, Width
from ..td_lora import TimestepLoRA
from .linear import channels, fused, gated, joined, linear, opened, split_heads, two_layers

_DOUBLE_PARTS = ("img_mod", "txt_mod", "img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "img_attn", "txt_attn",
                 "img_mlp", "txt_mlp")
_DOUBLE_LAYERS = ("img_attn.qkv", "txt_attn.qkv", "img_attn.proj", "txt_attn.proj", "img_mlp.0", "img_mlp.2")
_SINGLE_LAYERS = ("linear1", "linear2")
_SINGLE_PARTS = ("modulation", "pre_norm", "linear1", "linear2", "norm", "mlp_act")


class FluxFamily:
    name, stack = "FLUX", "double_blocks"
    # Layers of which a block takes rows or columns: where tokens are skipped, and where its width is less than full.
    cut_by_tokens = ("linear1",)
    cut_by_width = (*_DOUBLE_LAYERS, *_SINGLE_LAYERS)

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

    def names(self, model: nn.Module) -> list[str]:
        kinds = ("double", model.double_blocks), ("single", model.single_blocks)
        return [f"{kind} {index}" for kind, blocks in kinds for index in range(len(blocks))]

    def sizes(self, model: nn.Module) -> tuple[int, float]:
        block = model.double_blocks[0]  # there is always one; single blocks there may be none
        return block.hidden_size, block.img_mlp[0].out_features / block.hidden_size

    def geometry(self, model: nn.Module, image_tokens: int, context: Tensor | None = None) -> Geometry:
        return Geometry(image_tokens, 0 if context is None else context.shape[1], *self.sizes(model))

    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        def whole(block: nn.Module, names: tuple[str, ...]) -> frozenset[str]:
            return frozenset(name for name in names if backend.unsliceable(block.get_submodule(name)) is not None)

        return [flops.flux_double(geometry, whole(block, _DOUBLE_LAYERS)) for block in model.double_blocks] + [
            flops.flux_single(geometry, whole(block, _SINGLE_LAYERS)) for block in model.single_blocks
        ]

    def layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """The linear layers of a block that work on tokens, by name."""
        names = (*_DOUBLE_LAYERS, "txt_mlp.0", "txt_mlp.2") if hasattr(block, "img_mlp") else _SINGLE_LAYERS
        return {name: block.get_submodule(name) for name in names}

    def added_costs(self, model: nn.Module, geometry: Geometry, low_rank: TimestepLoRA | None) -> list[BlockCost]:
        if low_rank is None:
            return []
        double, total = len(model.double_blocks), len(self.blocks(model))
        of = [{layer: rank for (block, layer), rank in low_rank.ranks.items() if block == index} for index in range(total)]
        return [(flops.flux_double_low_rank if index < double else flops.flux_single_low_rank)(geometry, of[index])
                for index in range(total)]

    def level(self, model: nn.Module, sigmas: Tensor) -> Tensor:
        return sigmas

    def time_embedding(self, model: nn.Module, backend: Backend, sigmas: Tensor, dtype: torch.dtype) -> Tensor:
        return model.time_in(timestep_embedding(sigmas).to(dtype))

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        run = double_block if hasattr(block, "img_mlp") else single_block
        return run(block, index, current, backend, *args, **kwargs)


def _modulate(normed: Tensor, mod: Any) -> Tensor:
    return torch.addcmul(mod.shift, normed, 1 + mod.scale)


def _finite(x: Tensor) -> Tensor:
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def double_block(block: nn.Module, index: int, current: Pass, backend: Backend, img: Tensor, txt: Tensor, vec: Tensor,
                 pe: Tensor, attn_mask: Tensor | None = None, modulation_dims_img: Any = None,
                 modulation_dims_txt: Any = None, transformer_options: dict | None = None) -> tuple[Tensor, Tensor]:
    """Joint attention and text MLP on everything, image MLP on the kept tokens."""
    _refuse_ranges(modulation_dims_img, modulation_dims_txt)
    layer, mlp = partial(linear, current, backend, index, block), partial(_mlp, current, backend, index, block)
    width, head = current.width(index), img.shape[-1] // block.num_heads
    img_mod1, img_mod2 = block.img_mod(vec)
    txt_mod1, txt_mod2 = block.txt_mod(vec)
    rows, columns = fused(width, 3, head, img.shape[-1]), channels(width.heads, head, img.shape[-1])
    img_qkv = split_heads(layer("img_attn.qkv", _modulate(block.img_norm1(img), img_mod1), rows), 3, head)
    txt_qkv = split_heads(layer("txt_attn.qkv", _modulate(block.txt_norm1(txt), txt_mod1), rows), 3, head)
    img_q, img_k = block.img_attn.norm(*img_qkv)
    txt_q, txt_k = block.txt_attn.norm(*txt_qkv)
    q = backend.rotate(torch.cat((txt_q, img_q), dim=2), pe)
    k = backend.rotate(torch.cat((txt_k, img_k), dim=2), pe)
    v = torch.cat((txt_qkv[2], img_qkv[2]), dim=2)
    attn = gated(backend.attention(q, k, v, _mask_heads(attn_mask, width), transformer_options), width.head_gate)
    txt_attn, img_attn = attn.split((txt.shape[1], img.shape[1]), dim=1)

    img = img + layer("img_attn.proj", img_attn, columns=columns) * img_mod1.gate
    txt = txt + layer("txt_attn.proj", txt_attn, columns=columns) * txt_mod1.gate
    txt_normed = block.txt_norm2(txt)
    gate = Gate(index, current.sigma, img, vec, partial(block.img_norm2, img), txt, lambda: txt_normed)
    kept = current.select(gate)
    some, shift, scale = (x if kept is None else kept.take(x) for x in (gate.normed, img_mod2.shift, img_mod2.scale))
    values = mlp("img_mlp", torch.addcmul(shift, some, 1 + scale), width)
    img = current.update(index, img, img_mod2.gate, kept, values)
    txt = txt + mlp("txt_mlp", _modulate(txt_normed, txt_mod2), FULL_WIDTH) * txt_mod2.gate
    return img, _finite(txt)


def _mlp(current: Pass, backend: Backend, index: int, block: nn.Module, name: str, x: Tensor, width: Width) -> Tensor:
    activation = block.get_submodule(name)[1]
    return two_layers(current, backend, index, block, name, ("0", "2"), activation, x, width)


def single_block(block: nn.Module, index: int, current: Pass, backend: Backend, x: Tensor, vec: Tensor, pe: Tensor,
                 attn_mask: Tensor | None = None, modulation_dims: Any = None,
                 transformer_options: dict | None = None) -> Tensor:
    """Keys and values from everything; queries, MLP and output for text and the kept image tokens."""
    _refuse_ranges(modulation_dims)
    text = current.text_tokens
    mod, _ = block.modulation(vec)
    normed = block.pre_norm(x)
    txt, img = x.split((text, x.shape[1] - text), dim=1)
    kept = current.select(Gate(index, current.sigma, img, vec, lambda: normed[:, text:], txt, lambda: normed[:, :text]))
    chosen = [(slice(None), None)] if kept is None else [(rows, _with_text(tokens, text)) for rows, tokens in kept.parts]
    outputs = _single_outputs(block, index, current, backend, _modulate(normed, mod), chosen, pe, attn_mask, transformer_options)

    txt_values = outputs[0][:, :text] if len(outputs) == 1 else torch.cat([out[:, :text] for out in outputs])
    txt = txt + txt_values * mod.gate
    values = [out[:, text:] for out in outputs]
    img = current.update(index, img, mod.gate, kept, values[0] if kept is None else kept.together(values))
    return _finite(torch.cat((txt, img), dim=1))


Chosen = Sequence[tuple[slice, Tensor | None]]


def _single_outputs(block: nn.Module, index: int, current: Pass, backend: Backend, modulated: Tensor, chosen: Chosen,
                    pe: Tensor, mask: Tensor | None, options: dict | None) -> list[Tensor]:
    """Block output [rows, text + k, width] for each part of `chosen`."""
    width, head = current.width(index), block.hidden_size // block.num_heads
    hidden_size = block.linear1.out_features - 3 * block.hidden_size
    group = hidden_size // max(1, width.group_count)
    k, v, queries, hidden = _single_inputs(block, index, current, backend, modulated, chosen, width, group)
    columns = joined((*channels(width.heads, head, block.hidden_size),
                      *channels(width.groups, group, hidden_size, block.hidden_size)))
    k = backend.rotate(block.norm.key_norm(k).to(v), pe)
    mask, outputs = _mask_heads(mask, width), []
    for (rows, tokens), q, mlp in zip(chosen, queries, hidden):
        table = pe if pe.shape[0] == 1 else pe[rows]
        q = backend.rotate(block.norm.query_norm(q).to(v), table if tokens is None else take_rows(table, tokens, 2))
        attn = backend.attention(q, k[rows], v[rows], _mask_rows(mask, rows, tokens), options)
        both = torch.cat((gated(attn, width.head_gate), gated(block.mlp_act(mlp), width.group_gate)), dim=2)
        outputs.append(linear(current, backend, index, block, "linear2", both, columns=columns))
    return outputs


def _single_inputs(block: nn.Module, index: int, current: Pass, backend: Backend, modulated: Tensor, chosen: Chosen,
                   width: Width, group: int) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
    """Keys and values of every token; queries and MLP inputs of each part of `chosen`."""
    size, head = block.hidden_size, block.hidden_size // block.num_heads
    hidden_size = block.linear1.out_features - 3 * size
    everything = width.heads is None and width.groups is None and all(tokens is None for _, tokens in chosen)
    if backend.unsliceable(block.linear1) is not None or (everything and current.low_rank(index, "linear1", modulated) is None):
        out = linear(current, backend, index, block, "linear1", modulated)
        qkv, mlp = out.split((3 * size, hidden_size), dim=-1)
        q, k, v = split_heads(take_lines(qkv, -1, fused(width, 3, head, size)), 3, head)
        mlp = take_lines(mlp, -1, channels(width.groups, group, hidden_size))
        return (k, v, [q[rows] if tokens is None else take_rows(q[rows], tokens, 2) for rows, tokens in chosen],
                [mlp[rows] if tokens is None else gather(mlp[rows], tokens) for rows, tokens in chosen])
    queries, hidden = [], []
    mlp_rows = channels(width.groups, group, hidden_size, 3 * size)
    with opened(current, backend, index, block, "linear1", modulated) as linear1:
        k, v = split_heads(linear1(modulated, fused(width, 2, head, size, size), part="kv"), 2, head)
        for rows, tokens in chosen:
            some = modulated[rows] if tokens is None else gather(modulated[rows], tokens)
            queries.append(split_heads(linear1(some, fused(width, 1, head, size), part="q"), 1, head)[0])
            hidden.append(linear1(some, mlp_rows, part="mlp"))
    return k, v, queries, hidden


def _with_text(tokens: Tensor, text: int) -> Tensor:
    """Indices into [text, image] of all text tokens and the image tokens `tokens` [rows, k]."""
    every = torch.arange(text, device=tokens.device).expand(tokens.shape[0], -1)
    return torch.cat((every, tokens + text), dim=1)


def _mask_heads(mask: Tensor | None, width: Width) -> Tensor | None:
    """An attention mask that has heads of its own, [rows, heads, queries, keys], for those that are computed."""
    if mask is None or mask.ndim < 4 or mask.shape[1] == 1:
        return mask
    return take_lines(mask, 1, channels(width.heads, 1, mask.shape[1]))


def _mask_rows(mask: Tensor | None, rows: slice, tokens: Tensor | None) -> Tensor | None:
    """An attention mask [queries, keys], [rows, queries, keys] or [rows, heads, queries, keys] for the kept queries.

    Any axis but the last may be 1.
    """
    if mask is None or tokens is None:
        return mask
    mask = mask[None] if mask.ndim == 2 else mask
    mask = mask if mask.shape[0] == 1 else mask[rows]
    return mask if mask.shape[-2] == 1 else take_rows(mask, tokens, mask.ndim - 2)


def _refuse_ranges(*dims: Any) -> None:
    if any(dim is not None for dim in dims):
        raise ValueError(
            "DyDiT Budget: this graph modulates reference images at another timestep (index_timestep_zero), which "
            "token skipping does not support yet. Use another reference method, or set the budget to 1.0."
        )
