"""What a file holds, told from its header: names, types, sizes and metadata, no tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from . import adapter, routers
from .dit_keys import seems_dit
from .files import is_pickle, opened
from .fit import Layout
from .flux_keys import ROUTER, depths
from .source import Source, open_source

BFL, DIFFUSERS = "Black Forest Labs' layout (ComfyUI)", "diffusers' layout"
_LORA = re.compile(r"\.(lora_[AB]|lora_(down|up)|lora\.(down|up)|hada_w\d_[ab]|lokr_w\d)\b")
_VAE = ("decoder.conv_in.weight", "decoder.conv_out.weight")


@dataclass(frozen=True)
class Contents:
    """`kind`: adapter, routers, flux, dit, lora, vae or unknown; `layout` of a FLUX or of what routers fit."""

    kind: str
    source: Source
    layout: Layout | None = None
    naming: str = ""
    has_routers: bool = False
    pickled: bool = False


def contents(path: Path) -> Contents:
    """Raises FileError for a file that is not what its first bytes say."""
    source = open_source(path)
    keys, words, pickled = source.entries, source.metadata, is_pickle(path)
    if words.get("format") == adapter.FORMAT:
        return Contents("adapter", source)
    if words.get("format") == routers.FORMAT:
        return Contents("routers", source, routers.load_routers(path).fit.layout)
    with_routers = any(f".{ROUTER}." in key for key in keys)
    for door, naming in (("img_in.weight", BFL), ("x_embedder.weight", DIFFUSERS)):
        double, single = depths(keys)
        if door in keys and double and len(keys[door].shape) == 2:
            layout = Layout(keys[door].shape[0], double, single)
            return Contents("flux", source, layout, naming, with_routers, pickled)
    if seems_dit(keys):
        return Contents("dit", source, pickled=pickled)
    if any(_LORA.search(key) for key in keys):
        return Contents("lora", source, pickled=pickled)
    if all(any(key.endswith(part) for key in keys) for part in _VAE) or any(key.startswith("taesd_") for key in keys):
        return Contents("vae", source, pickled=pickled)
    return Contents("unknown", source, has_routers=with_routers, pickled=pickled)


def load(path: str | Path) -> adapter.Adapter | routers.Routers:
    """What a trained router's file holds, ours or the DyDiT authors'. Raises FileError."""
    with opened(Path(path), "choose the .safetensors of the adapter", "choose an adapter in ComfyUI/models/dydit") as file:
        released = (file.metadata() or {}).get("format") == routers.FORMAT
    return routers.load_routers(path) if released else adapter.load_adapter(path)
