"""The router file: token routers of the DyDiT authors for one FLUX layout, in a `.safetensors` of its own.

Six tensors a block, named as in the authors' file but under BFL's block names; W = width:

    {double,single}_blocks.I.token_selection.linear_t.weight [4W, W]   .linear_t.bias [4W]
                                            .norm.weight [W]           .norm.bias [W]
                                            .router.weight [1, W]      .router.bias [1]      see `routers.official`

Metadata, all strings:

    format, version                dydit-flux-routers, 1
    family, width, double, single  the layout of the base model; it must be the same to be used
    text_tokens, threshold         256, 0.5: text slots the routers average over; a token is computed above it
    base                           JSON {parameter: [mean, root mean square]}: small tensors of the base (`fit.sketch`)
    dtype                          of all tensors
    modelspec.*                    Stability AI ModelSpec 1.0.1

The same tensors may lie in one file with the base, in BFL's or diffusers' naming and without this metadata (`find`).
They are gigabytes, so they stay in the file until a block is asked for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ..routers.official import OfficialRouter, RouterWeights
from .files import bad, opened
from .fit import Fit, Layout, Sketch, read_sketch
from .flux_keys import ROUTER, ROUTER_PARTS, depths, router_keys, router_shapes
from .source import AGAIN, Source, check_entries, open_source

FORMAT, VERSION = "dydit-flux-routers", "1"
TEXT_TOKENS, THRESHOLD = 256, 0.5
_SIZES = ("width", "double", "single")


@dataclass(frozen=True, eq=False)
class Routers:
    """Routers that lie in `path` under `names`, one for each gated block."""

    path: Path
    fit: Fit
    names: tuple[str, ...]

    @property
    def router(self) -> OfficialRouter:
        return OfficialRouter(self.read, len(self.names))

    def with_base(self, base: Sketch) -> Routers:
        """The same, that knows the model it lies beside."""
        return replace(self, fit=replace(self.fit, base=base))

    def read(self, block: int) -> RouterWeights:
        """The weights of one block, mapped: they are for folding, not for keeping. Raises FileError."""
        with opened(self.path, "load it again", "put it back, or load the routers again") as file:
            tensors = {key: file.get_tensor(key) for key in (f"{self.names[block]}.{part}" for part in ROUTER_PARTS)}
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                raise bad(self.path, f"has numbers in {key} that are not finite (NaN or infinity)", AGAIN)
        return RouterWeights(*tensors.values())


def metadata(fit: Fit, dtype: str) -> dict[str, str]:
    """What a router file says about itself."""
    return {
        "format": FORMAT, "version": VERSION, "family": "FLUX",
        "width": str(fit.layout.width), "double": str(fit.layout.double), "single": str(fit.layout.single),
        "text_tokens": str(TEXT_TOKENS), "threshold": str(THRESHOLD), "base": json.dumps(fit.base), "dtype": dtype,
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1/dydit-token-router",
        "modelspec.implementation": "https://github.com/alibaba-damo-academy/DyDiT",
        "modelspec.title": fit.title,
    }


def load_routers(path: str | Path) -> Routers:
    """The routers of a router file. Raises FileError."""
    path = Path(path)
    with opened(path, "convert it: python -m dydit_core convert", "choose a router file in ComfyUI/models/dydit"):
        source = open_source(path)
    words = source.metadata
    if words.get("format") != FORMAT:
        raise bad(path, f"is no router file (its metadata lacks format={FORMAT})", "choose a file that convert wrote")
    if words.get("version") != VERSION:
        raise bad(path, f"has version {words.get('version')!r} of the router format, and this is version {VERSION}",
                  "update DyDiT for ComfyUI, or convert the released file again")
    for key, value in (("text_tokens", str(TEXT_TOKENS)), ("threshold", str(THRESHOLD))):
        if words.get(key) != value:
            raise bad(path, f"has {key}={words.get(key)!r} in its metadata, and this reads {value}", "convert the released file again")
    layout = Layout(*(_size(path, words, key) for key in _SIZES))
    try:
        base = read_sketch(json.loads(words["base"]))
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        raise bad(path, "has no metadata key base that can be read", "convert the released file again") from None
    keys = router_keys(layout, diffusers=False)
    extra = sorted(set(source.entries) - set(keys))
    if extra:
        raise bad(path, f"has a tensor {extra[0][:80]} that no router file has", "convert the released file again")
    return _checked(source, Fit(words.get("modelspec.title") or path.stem, layout, base), keys)


def find(source: Source, title: str) -> Routers:
    """The routers that lie in one file with their base. Raises FileError."""
    present = [key for key in source.entries if f".{ROUTER}." in key]
    if not present:
        raise bad(source.path, "has no token routers in it (token_selection)", "load it with Load Diffusion Model")
    diffusers = "transformer_blocks." in present[0]
    door = source.entries.get("x_embedder.weight") or source.entries.get("img_in.weight")
    if door is None or len(door.shape) != 2:
        raise bad(source.path, "has token routers but no FLUX (img_in.weight) beside them", AGAIN)
    layout = Layout(door.shape[0], *depths(source.entries))
    return _checked(source, Fit(title, layout), router_keys(layout, diffusers))


def _checked(source: Source, fit: Fit, keys: Mapping[str, str]) -> Routers:
    """Names, types and sizes from the header; `keys`: ours to the file's."""
    check_entries(source, {theirs: shape for theirs, shape in zip(keys.values(), router_shapes(fit.layout).values())}, "routers")
    names = [source.entries[theirs].name.rpartition(f".{ROUTER_PARTS[0]}")[0] for theirs in keys.values()
             if theirs.endswith(ROUTER_PARTS[0])]
    return Routers(source.path, fit, tuple(names))


def _size(path: Path, words: Mapping[str, str], key: str) -> int:
    text = words.get(key, "")
    # isdecimal alone accepts digits of every script.
    size = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else -1
    if size < (0 if key == "single" else 1):
        raise bad(path, f"has {key}={text[:40]!r} in its metadata, which is not a size", "convert the released file again")
    return size
