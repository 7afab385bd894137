"""Names and sizes of the tensors in a DiT, SiT, Latte or DyDiT file.

A model's are those of `models.dit`, as in the files of facebookresearch/DiT and willisma/SiT, or those of `models.latte`, as in
Vchitect/Latte's: a DiT's, with positions in time and with or without classes. A DyDiT has routers in every
block, eight tensors more (alibaba-damo-academy/DyDiT); W = width, H = heads, G = channel groups, R = the token router's hidden width:

    blocks.I.attn_rate.router.weight [H − 1, W]    .bias [H − 1]      reads the embedding of the timestep
    blocks.I.mlp_rate.router.weight [G − 1, W]     .bias [G − 1]
    blocks.I.token_selection.mlp_head.0.weight [R, W]  .bias [R]      reads each token
    blocks.I.token_selection.mlp_head.2.weight [1, R]  .bias [1]

Head 0 and group 0 are always on and have no output. In the files of December 2024 they have: H and G outputs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from ..models.dit import DiTConfig
from ..models.latte import network
from .latte import TIMES, seems_latte

HEADS, GROUPS, TOKEN_DOWN, TOKEN_UP = "attn_rate.router", "mlp_rate.router", "token_selection.mlp_head.0", "token_selection.mlp_head.2"
_ROUTERS = (HEADS, GROUPS, TOKEN_DOWN, TOKEN_UP)
_ENDS = ("weight", "bias")
_DOOR = "y_embedder.embedding_table.weight"
# diffusers gives every block a class embedding of its own, beside names and a split of layers that nothing here reads.
_DIFFUSERS = re.compile(r"transformer_blocks\.\d+\.norm1\.emb\.class_embedder\.embedding_table\.weight")


@dataclass(frozen=True)
class RouterSizes:
    """`heads`, `groups`: units, which have one output less where the first is `always_on`; `hidden`: width of the token router."""

    heads: int
    groups: int
    hidden: int
    always_on: bool = True


@dataclass(frozen=True)
class Sizes:
    """What a few tensors say. `positions`: tokens of a picture or a frame; `labels`: classes and the null class, 0 where there are
    none; `head_outputs`, `group_outputs`: of the routers, 0 without; `frames`: of a Latte, 0 of a DiT."""

    width: int
    depth: int
    in_channels: int
    patch: int
    positions: int
    hidden: int
    out_channels: int
    labels: int = 0
    frames: int = 0
    head_outputs: int = 0
    group_outputs: int = 0
    router_hidden: int = 0


def is_router(key: str) -> bool:
    return any(f".{part}." in key for part in _ROUTERS)


def seems_dit(keys: Collection[str]) -> bool:
    """These keys are meant to be a DiT's or a Latte's, whole or not: a class embedding, positions in time, or DyDiT's routers."""
    return seems_latte(keys) or diffusers_key(keys) is not None or any(key == _DOOR or (key.startswith("blocks.") and is_router(key)) for key in keys)


def diffusers_key(keys: Iterable[str]) -> str | None:
    """The first of these keys that a DiT has in diffusers' layout alone."""
    return next(filter(_DIFFUSERS.fullmatch, keys), None)


def read_sizes(shapes: Mapping[str, tuple[int, ...]]) -> Sizes | str:
    """Sizes of a file, or the key that is missing or has no such shape."""
    found = {}
    wanted = [("width", "x_embedder.proj.weight", 4, 0), ("in_channels", "x_embedder.proj.weight", 4, 1),
              ("patch", "x_embedder.proj.weight", 4, 2), ("positions", "pos_embed", 3, 1),
              ("hidden", "blocks.0.mlp.fc1.weight", 2, 0), ("out_rows", "final_layer.linear.weight", 2, 0)]
    if seems_latte(shapes):
        wanted.append(("frames", TIMES, 3, 1))
    if _DOOR in shapes or not seems_latte(shapes):
        wanted.append(("labels", _DOOR, 2, 0))
    if any(map(is_router, shapes)):
        wanted += [("head_outputs", f"blocks.0.{HEADS}.weight", 2, 0), ("group_outputs", f"blocks.0.{GROUPS}.weight", 2, 0),
                   ("router_hidden", f"blocks.0.{TOKEN_DOWN}.weight", 2, 0)]
    for name, key, rank, axis in wanted:
        if len(shapes.get(key, ())) != rank or not shapes[key][axis]:
            return key
        found[name] = shapes[key][axis]
    # The model that a file is compared with computes its positions, so no more are believed in than the file holds.
    for key in ("pos_embed", TIMES):
        if key in shapes and shapes[key] != (1, shapes[key][1], found["width"]):
            return key
    # A block has more tensors than one, so a number beyond theirs is a name that was made up.
    depth = min(1 + max(_block_of(key) for key in shapes), len(shapes))
    return Sizes(depth=depth, out_channels=found.pop("out_rows") // found["patch"] ** 2, **found)


def base_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the model, in the order of the file."""
    return {key: tuple(value.shape) for key, value in network(config, device=torch.device("meta")).state_dict().items()}


def router_shapes(config: DiTConfig, sizes: RouterSizes) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the routers."""
    width, less = config.hidden_size, int(sizes.always_on)
    parts = {HEADS: (sizes.heads - less, width), GROUPS: (sizes.groups - less, width), TOKEN_DOWN: (sizes.hidden, width), TOKEN_UP: (1, sizes.hidden)}
    return {f"blocks.{block}.{part}.{end}": shape if end == "weight" else shape[:1]
            for block in range(config.depth) for part, shape in parts.items() for end in _ENDS}


def _block_of(key: str) -> int:
    """Number of the block that `key` belongs to, −1 outside."""
    found = re.match(r"blocks\.(\d{1,4})\.", key)
    return int(found[1]) if found else -1
