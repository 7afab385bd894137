"""The two names of every FLUX tensor: diffusers' and Black Forest Labs', which ComfyUI loads.

BFL fuses what diffusers keeps apart: query, key and value (and a single block's MLP) are rows of one matrix. The final
modulation is (scale, shift) in diffusers and (shift, scale) in BFL. A token router (DyDiT, FLUX release) adds six
tensors to a block. Map: diffusers' conversion of FLUX.1, and `comfy.utils.flux_to_diffusers`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .fit import Layout

ROUTER = "token_selection"
ROUTER_PARTS = ("linear_t.weight", "linear_t.bias", "norm.weight", "norm.bias", "router.weight", "router.bias")
STACKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"}
_ENDS = ("weight", "bias")

_DOUBLE = {
    "img_mod.lin": ("norm1.linear",),
    "txt_mod.lin": ("norm1_context.linear",),
    "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
    "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn.proj": ("attn.to_out.0",),
    "txt_attn.proj": ("attn.to_add_out",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
}
_DOUBLE_NORMS = {
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": ("norm.linear",),
    "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "linear2": ("proj_out",),
}
_SINGLE_NORMS = {"norm.query_norm": "attn.norm_q", "norm.key_norm": "attn.norm_k"}
_OUTSIDE = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
    "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
    "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
    "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
    "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
SWAPPED = "norm_out.linear"


@dataclass(frozen=True)
class Sizes:
    """Everything the shapes of a FLUX follow from. `patch`: channels of an image token at the door."""

    layout: Layout
    patch: int
    context: int
    pooled: int
    embedding: int
    head: int
    hidden: int
    guidance: bool


def depths(keys: Iterable[str]) -> tuple[int, int]:
    """Numbers of double and single blocks that `keys` of either naming speak of."""
    found = {name: 0 for name in STACKS}
    names = {**{name: name for name in STACKS}, **{theirs: name for name, theirs in STACKS.items()}}
    for key in keys:
        match = re.match(r"(\w+)\.(\d{1,4})\.", key)
        if match and match[1] in names:
            found[names[match[1]]] = max(found[names[match[1]]], int(match[2]) + 1)
    return found["double_blocks"], found["single_blocks"]


def base_keys(sizes: Sizes) -> dict[str, tuple[str, ...]]:
    """BFL key to the diffusers keys whose rows it is made of, in the order of the file."""
    keys: dict[str, tuple[str, ...]] = {}
    for ours, theirs in _OUTSIDE.items():
        if sizes.guidance or not ours.startswith("guidance_in"):
            keys |= {f"{ours}.{end}": (f"{theirs}.{end}",) for end in _ENDS}
    for stack, count, layers, norms in (("double_blocks", sizes.layout.double, _DOUBLE, _DOUBLE_NORMS),
                                        ("single_blocks", sizes.layout.single, _SINGLE, _SINGLE_NORMS)):
        for index in range(count):
            block, source = f"{stack}.{index}", f"{STACKS[stack]}.{index}"
            for ours, theirs in layers.items():
                keys |= {f"{block}.{ours}.{end}": tuple(f"{source}.{part}.{end}" for part in theirs) for end in _ENDS}
            keys |= {f"{block}.{ours}.scale": (f"{source}.{theirs}.weight",) for ours, theirs in norms.items()}
    return keys


def router_keys(layout: Layout, diffusers: bool) -> dict[str, str]:
    """Router key in our naming to that in the naming asked for, block after block."""
    return {
        f"{stack}.{index}.{ROUTER}.{part}": f"{STACKS[stack] if diffusers else stack}.{index}.{ROUTER}.{part}"
        for stack, count in (("double_blocks", layout.double), ("single_blocks", layout.single))
        for index in range(count) for part in ROUTER_PARTS
    }


def router_shapes(layout: Layout) -> dict[str, tuple[int, ...]]:
    """Shape of each key of `router_keys` in our naming."""
    width = layout.width
    part = {"linear_t.weight": (4 * width, width), "linear_t.bias": (4 * width,), "norm.weight": (width,),
            "norm.bias": (width,), "router.weight": (1, width), "router.bias": (1,)}
    return {key: part[key.partition(f"{ROUTER}.")[2]] for key in router_keys(layout, diffusers=False)}


def source_shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Shape of every diffusers key of the base."""
    width, hidden = sizes.layout.width, sizes.hidden
    rows = {"norm1.linear": 6 * width, "norm1_context.linear": 6 * width, "norm.linear": 3 * width,
            "norm_out.linear": 2 * width, "ff.net.0.proj": hidden, "ff_context.net.0.proj": hidden, "proj_mlp": hidden}
    columns = {"ff.net.2": hidden, "ff_context.net.2": hidden, "x_embedder": sizes.patch,
               "context_embedder": sizes.context, "text_embedder.linear_1": sizes.pooled,
               "timestep_embedder.linear_1": sizes.embedding, "guidance_embedder.linear_1": sizes.embedding}

    def shape(key: str) -> tuple[int, ...]:
        block = re.match(r"(single_)?transformer_blocks\.\d+\.(.+)\.\w+$", key)
        layer = block[2] if block else key.rpartition(".")[0].removeprefix("time_text_embed.")
        if ".norm_" in f".{layer}" and block:
            return (sizes.head,)
        out = sizes.patch if layer == "proj_out" and not block else rows.get(layer, width)
        into = width + hidden if layer == "proj_out" and block else columns.get(layer, width)
        return (out, into) if key.endswith(".weight") else (out,)

    return {key: shape(key) for parts in base_keys(sizes).values() for key in parts}


def read_sizes(shapes: Mapping[str, tuple[int, ...]]) -> Sizes | str:
    """Sizes of a file in diffusers' naming, or the key that is missing or has no such shape."""
    sizes = {}
    for name, key, rank, axis in (
        ("width", "x_embedder.weight", 2, 0), ("patch", "x_embedder.weight", 2, 1),
        ("context", "context_embedder.weight", 2, 1), ("pooled", "time_text_embed.text_embedder.linear_1.weight", 2, 1),
        ("embedding", "time_text_embed.timestep_embedder.linear_1.weight", 2, 1),
        ("head", "transformer_blocks.0.attn.norm_q.weight", 1, 0),
        ("hidden", "transformer_blocks.0.ff.net.0.proj.weight", 2, 0),
    ):
        if len(shapes.get(key, ())) != rank:
            return key
        sizes[name] = shapes[key][axis]
    layout = Layout(sizes.pop("width"), *depths(shapes))
    return Sizes(layout, guidance=any(".guidance_embedder." in key for key in shapes), **sizes)
