"""Our adapter file: a learned token router (SDT) for one FLUX layout, in a single `.safetensors`.

Tensors, all float32; B = gated blocks (double, then single), W = width, R = rank, S = sigma bins, L = levels:

    scores.weight [B, W]   scores.text [B, W]   scores.down [B, R, W]   scores.up [B, W, R]
    scores.slope [B, R]    scores.bias [B]                              see `routers.token.TokenScores`
    table.quantiles [B, S, L]   table.edges [S]                         see `routers.token.CapacityTable`

Metadata, all strings:

    format, version                dydit-adapter, 1
    family, width, rank, double, single   the layout of the base model; it must be the same to be used
    base                           JSON {parameter: [mean, root mean square]}: small tensors of the base (`fit.sketch`)
    substitutes, budgets           comma-separated: what stood in during training; budgets checked after calibration
    training                       JSON: steps, seed, losses, …
    modelspec.*                    Stability AI ModelSpec 1.0.1: title, architecture, description, license, date, …

Everything in the header is checked before a tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..routers.token import CapacityTable, TokenScores
from .files import bad, opened
from .fit import Fit, Layout, Sketch, read_sketch

FORMAT, VERSION = "dydit-adapter", "1"
_MODELSPEC = "modelspec."
_IMPLEMENTATION = "https://arxiv.org/abs/2504.06803"
_KEYS = ("scores.weight", "scores.text", "scores.down", "scores.up", "scores.slope", "scores.bias", "table.quantiles",
         "table.edges")
_NUMBERS = ("width", "rank", "double", "single")
_WORDS = ("family", "base", "substitutes", "budgets", "training", "modelspec.title")
_AGAIN = "get the adapter again from where it was published"


@dataclass(frozen=True)
class Facts:
    """What the file says about itself. `double`, `single`: blocks of the base model; `base`: its `fit.sketch`."""

    double: int
    single: int
    title: str
    family: str = "FLUX"
    substitutes: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    base: Sketch = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    license: str = ""
    date: str = ""


@dataclass(frozen=True, eq=False)
class Adapter:
    scores: TokenScores
    table: CapacityTable
    facts: Facts

    @property
    def width(self) -> int:
        return self.scores.weight.shape[1]

    @property
    def fit(self) -> Fit:
        return Fit(self.facts.title, Layout(self.width, self.facts.double, self.facts.single), self.facts.base)


def save_adapter(path: str | Path, adapter: Adapter) -> None:
    facts, rank = adapter.facts, adapter.scores.down.shape[1]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "family": facts.family,
        "width": str(adapter.width),
        "rank": str(rank),
        "double": str(facts.double),
        "single": str(facts.single),
        "base": json.dumps(facts.base),
        "substitutes": ",".join(facts.substitutes),
        "budgets": ",".join(str(budget) for budget in facts.budgets),
        "training": json.dumps(facts.training),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "flux-1/dydit-token-router",
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": facts.title,
        "modelspec.description": facts.description,
        "modelspec.license": facts.license,
        "modelspec.date": facts.date,
    }
    tensors = {f"scores.{name}": value for name, value in adapter.scores.state_dict().items()}
    tensors |= {"table.quantiles": adapter.table.quantiles, "table.edges": adapter.table.edges}
    save_file({name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, path, metadata)


def load_adapter(path: str | Path) -> Adapter:
    """The adapter in `path`, on the CPU, frozen. Raises FileError."""
    path = Path(path)
    with opened(path, "choose the .safetensors of the adapter", "choose an adapter in ComfyUI/models/dydit") as file:
        facts, sizes = _facts(path, file.metadata() or {})
        _check_tensors(path, file, facts, *sizes)
        # Cloned: a view would keep the file mapped, and Windows cannot replace a mapped file.
        tensors = {key: file.get_tensor(key).clone() for key in _KEYS}
    _check_values(path, tensors)
    with torch.device("meta"):
        scores = TokenScores(facts.double + facts.single, *sizes)
    scores.load_state_dict({key[7:]: tensors[key] for key in _KEYS if key.startswith("scores.")}, assign=True)
    table = CapacityTable(tensors["table.quantiles"], tensors["table.edges"])
    return Adapter(scores.requires_grad_(False), table, facts)


def _facts(path: Path, metadata: dict[str, str]) -> tuple[Facts, tuple[int, int]]:
    """Facts, and (width, rank)."""
    if metadata.get("format") != FORMAT:
        raise bad(path, f"is a safetensors file but no DyDiT adapter (its metadata lacks format={FORMAT})",
                   "a LoRA or a model has its own loader, so choose a file made for DyDiT")
    if metadata.get("version") != VERSION:
        raise bad(path, f"has version {metadata.get('version')!r} of the adapter format, and this is version {VERSION}",
                   "update DyDiT for ComfyUI, or get the file in this version")
    for key in (*_NUMBERS, *_WORDS):
        if key not in metadata:
            raise bad(path, f"lacks the metadata key {key}", _AGAIN)
    numbers = {}
    for key in _NUMBERS:
        text = metadata[key]
        # isdecimal alone accepts digits of every script.
        size = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else -1
        if size < (0 if key == "single" else 1):
            raise bad(path, f"has {key}={text[:40]!r} in its metadata, which is not a size", _AGAIN)
        numbers[key] = size
    facts = Facts(
        double=numbers["double"],
        single=numbers["single"],
        title=metadata["modelspec.title"],
        family=metadata["family"],
        substitutes=tuple(filter(None, metadata["substitutes"].split(","))),
        budgets=_read(path, metadata, "budgets", lambda text: tuple(float(part) for part in text.split(",") if part)),
        base=_read(path, metadata, "base", lambda text: read_sketch(json.loads(text))),
        training=_read(path, metadata, "training", lambda text: dict(json.loads(text))),
        **{key: metadata.get(_MODELSPEC + key, "") for key in ("description", "license", "date")},
    )
    return facts, (numbers["width"], numbers["rank"])


def _read(path: Path, metadata: dict[str, str], key: str, parse: Any) -> Any:
    try:
        return parse(metadata[key])
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise bad(path, f"has a metadata key {key} that cannot be read ({metadata[key][:40]!r})",
                   _AGAIN) from None


def _check_tensors(path: Path, file: Any, facts: Facts, width: int, rank: int) -> None:
    """Names, types and sizes against the metadata; reads the header only."""
    found = set(file.keys())
    for key in _KEYS:
        if key not in found:
            raise bad(path, f"lacks the tensor {key}", _AGAIN)
    for key in sorted(found - set(_KEYS)):
        raise bad(path, f"has a tensor {key[:80]} that no adapter of version {VERSION} has", _AGAIN)
    blocks = facts.double + facts.single
    levels = file.get_slice("table.quantiles").get_shape()[-1:]
    bins = file.get_slice("table.edges").get_shape()
    expected = {
        "scores.weight": [blocks, width], "scores.text": [blocks, width], "scores.down": [blocks, rank, width],
        "scores.up": [blocks, width, rank], "scores.slope": [blocks, rank], "scores.bias": [blocks],
        "table.edges": bins[:1] or [1], "table.quantiles": [blocks, *bins[:1], *levels],
    }
    for key in _KEYS:
        piece = file.get_slice(key)
        if piece.get_dtype() != "F32":
            raise bad(path, f"has {key} in {piece.get_dtype()}, and adapters are float32 (F32)", _AGAIN)
        if piece.get_shape() != expected[key]:
            raise bad(path, f"has {key} of size {piece.get_shape()} where its metadata says {expected[key]}", _AGAIN)
    if not bins[0] or levels[0] < 2:
        raise bad(path, "has an empty capacity table (table.quantiles)", _AGAIN)


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise bad(path, f"has numbers in {key} that are not finite (NaN or infinity)",
                       "its training went wrong or the file is damaged, so get another one")
        if key.startswith("table.") and (value.diff(dim=-1) < 0).any():
            raise bad(path, f"has a table {key} that does not rise", "calibrate the adapter again")
