"""Our adapter file: learned gates for one FLUX layout, in a single `.safetensors`.

It has token scores with their capacity table (SDT), width scores (TDW) or both, and may have a TD-LoRA. Tensors, all
float32; B = gated blocks (double, then single), W = width, M = MLP channels of a block, N = experts, K = knots:

    scores.weight [B, W]   scores.text [B, W] (FLUX)   scores.down [B, rank, W]   scores.up [B, W, rank]
    scores.slope [B, rank]    scores.bias [B]    scores.stale [B] (may be missing)   see `routers.token.TokenScores`
    table.quantiles [B, sigma bins, levels]   table.edges [sigma bins]  see `routers.token.CapacityTable`
    width.heads [K, B, heads]   width.groups [K, B, groups]             see `routers.width.WidthScores`
    low_rank.mix [K, B, N]                                              see `td_lora.TimestepLoRA`
    low_rank.BLOCK.LAYER.down [1 or N, rank, inputs]   low_rank.BLOCK.LAYER.up [1 or N, outputs, rank]

Metadata, all strings:

    format, version                dydit-adapter, 1
    family, width, double, single  the layout of the base model, FLUX or as DiT/2; it must be the same to be used; blocks of a DiT are single
    rank, sketch; heads, groups; experts, mlp, low_rank_gate   sizes of the three parts, where they are there
    base                           JSON {parameter: [mean, root mean square]}: small tensors of the base (`fit.sketch`)
    substitutes, budgets           comma-separated: what stood in during training, first of all; budgets checked after calibration
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

from ..routers.learned import LearnedRouter
from ..routers.sketch import channels
from ..routers.token import CapacityTable, TokenScores
from ..routers.width import WidthScores
from ..td_lora import TimestepLoRA
from . import sections
from .files import bad, opened
from .fit import FLUX, Fit, Layout, Sketch, read_sketch

FORMAT, VERSION = "dydit-adapter", "1"
_MODELSPEC = "modelspec."
_IMPLEMENTATION = "https://arxiv.org/abs/2504.06803"
_NUMBERS = ("width", "double", "single")
_OPTIONAL = ("rank", "sketch", "heads", "groups", "experts", "mlp")
# What the ModelSpec calls a family, where it has a name of its own for it.
_ARCHITECTURES = {FLUX: "flux-1"}
_WORDS = ("family", "base", "substitutes", "budgets", "training", "modelspec.title")
_AGAIN = "get the adapter again from where it was published"


@dataclass(frozen=True)
class Facts:
    """What the file says about itself. `double`, `single`, `kind`: of the base model's `Layout`; `base`: its `fit.sketch`."""

    double: int
    single: int
    width: int
    title: str
    kind: str = FLUX
    substitutes: tuple[str, ...] = ()
    budgets: tuple[float, ...] = ()
    base: Sketch = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    description: str = ""
    license: str = ""
    date: str = ""

    @property
    def layout(self) -> Layout:
        return Layout(self.width, self.double, self.single, self.kind)


@dataclass(frozen=True, eq=False)
class Adapter:
    facts: Facts
    scores: TokenScores | None = None
    table: CapacityTable | None = None
    width: WidthScores | None = None
    low_rank: TimestepLoRA | None = None

    @property
    def fit(self) -> Fit:
        return Fit(self.facts.title, self.facts.layout, self.facts.base)

    def misfit(self, heads: int, mlp: int) -> str | None:
        """Why the widths or the TD-LoRA do not fit blocks of `heads` and `mlp` MLP channels, or None."""
        if self.width is not None and self.width.heads.shape[-1] != heads:
            return f'the adapter "{self.facts.title}" was made for {self.width.heads.shape[-1]} attention heads; this model has {heads}'
        if self.width is not None and mlp % self.width.groups.shape[-1]:
            return f'the adapter "{self.facts.title}" has {self.width.groups.shape[-1]} channel groups, into which {mlp} MLP channels do not part'
        for (_, layer), down, up in zip(self.low_rank.keys, self.low_rank.down, self.low_rank.up) if self.low_rank is not None else ():
            made = {"0": up.shape[1], "fc1": up.shape[1], "2": down.shape[2], "fc2": down.shape[2]}.get(layer.rpartition("mlp.")[2], mlp)
            made = up.shape[1] - 3 * self.facts.width if layer == "linear1" else made
            if made != mlp:
                return f'the TD-LoRA of the adapter "{self.facts.title}" was made for {made} MLP channels; this model has {mlp}'
        return None

    @property
    def finite(self) -> bool:
        """All its numbers are."""
        tensors = [tensor for part in (self.scores, self.width, self.low_rank) if part is not None for tensor in part.parameters()]
        table = [] if self.table is None else [self.table.quantiles]
        return all(bool(torch.isfinite(tensor).all()) for tensor in (*tensors, *table))

    @property
    def router(self) -> LearnedRouter:
        trained_for = next(iter(self.facts.substitutes), "nothing")
        return LearnedRouter(self.scores, self.table, self.width, low_rank=self.low_rank, trained_for=trained_for)


def save_adapter(path: str | Path, adapter: Adapter, more: Mapping[str, str] | None = None) -> None:
    """Write `adapter`; `more` metadata is for other programs, and not read again."""
    facts = adapter.facts
    family = facts.kind.partition("/")[0]
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "family": facts.kind,
        "width": str(facts.width),
        "double": str(facts.double),
        "single": str(facts.single),
        "base": json.dumps(facts.base),
        "substitutes": ",".join(facts.substitutes),
        "budgets": ",".join(str(budget) for budget in facts.budgets),
        "training": json.dumps(facts.training),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{_ARCHITECTURES.get(family, family.lower())}/dydit-adapter",
        "modelspec.implementation": _IMPLEMENTATION,
        "modelspec.title": facts.title,
        "modelspec.description": facts.description,
        "modelspec.license": facts.license,
        "modelspec.date": facts.date,
    }
    tensors, sizes = sections.tensors(adapter.scores, adapter.table, adapter.width, adapter.low_rank, adapter.fit.layout)
    save_file({name: value.detach().float().cpu().contiguous() for name, value in tensors.items()}, path, {**(more or {}), **metadata, **sizes})


def load_adapter(path: str | Path) -> Adapter:
    """The adapter in `path`, on the CPU, frozen. Raises FileError."""
    path = Path(path)
    with opened(path, "choose the .safetensors of the adapter", "choose an adapter in ComfyUI/models/dydit") as file:
        metadata = file.metadata() or {}
        facts, sizes = read_facts(path, metadata)
        _check_tensors(path, file, facts, sizes)
        # Cloned: a view would keep the file mapped, and Windows cannot replace a mapped file.
        tensors = {key: file.get_tensor(key).clone() for key in file.keys()}
    _check_values(path, tensors)
    return Adapter(facts, *sections.build(tensors, facts.layout, metadata))


def read_facts(path: Path, metadata: dict[str, str]) -> tuple[Facts, dict[str, int]]:
    """Facts, and the sizes of what the file holds, from the header of `path`. Raises FileError."""
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
    for key in (*_NUMBERS, *(key for key in _OPTIONAL if key in metadata)):
        text = metadata[key]
        # isdecimal alone accepts digits of every script.
        size = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else -1
        if size < (0 if key in ("double", "single") else 1):
            raise bad(path, f"has {key}={text[:40]!r} in its metadata, which is not a size", _AGAIN)
        numbers[key] = size
    if not numbers["double"] + numbers["single"]:
        raise bad(path, "has no blocks by its metadata (double=0, single=0)", _AGAIN)
    for one, other in (("groups", "heads"), ("heads", "groups"), ("experts", "mlp")):
        if one in numbers and other not in numbers:
            raise bad(path, f"has {one} in its metadata and lacks {other}", _AGAIN)
    if (made := numbers.get("sketch")) is not None and made != channels(numbers["width"]):
        raise bad(path, f"compares {made} channels of each token, and this version {channels(numbers['width'])}", "update DyDiT for ComfyUI")
    if "experts" in numbers and metadata.get("low_rank_gate") not in sections.GATES:
        raise bad(path, f"has no low_rank_gate in its metadata that is one of {', '.join(sections.GATES)}", _AGAIN)
    facts = Facts(
        double=numbers["double"],
        single=numbers["single"],
        width=numbers["width"],
        title=metadata["modelspec.title"],
        kind=metadata["family"],
        substitutes=tuple(filter(None, metadata["substitutes"].split(","))),
        budgets=_read(path, metadata, "budgets", lambda text: tuple(float(part) for part in text.split(",") if part)),
        base=_read(path, metadata, "base", lambda text: read_sketch(json.loads(text))),
        training=_read(path, metadata, "training", lambda text: dict(json.loads(text))),
        **{key: metadata.get(_MODELSPEC + key, "") for key in ("description", "license", "date")},
    )
    return facts, numbers


def _read(path: Path, metadata: dict[str, str], key: str, parse: Any) -> Any:
    try:
        return parse(metadata[key])
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise bad(path, f"has a metadata key {key} that cannot be read ({metadata[key][:40]!r})",
                   _AGAIN) from None


def _check_tensors(path: Path, file: Any, facts: Facts, sizes: dict[str, int]) -> None:
    """Names, types and sizes against the metadata; reads the header only."""
    shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}
    if "rank" not in sizes and "groups" not in sizes:
        raise bad(path, "holds no gates: its metadata has neither rank (tokens) nor groups (widths)", _AGAIN)
    expected = sections.expected(sizes, shapes)
    for key in expected:
        if key not in shapes:
            raise bad(path, f"lacks the tensor {key}", _AGAIN)
    for key, shape in sorted(shapes.items()):
        if key not in expected:
            raise bad(path, f"has a tensor {key[:80]} that its metadata does not announce", _AGAIN)
        if (dtype := file.get_slice(key).get_dtype()) != "F32":
            raise bad(path, f"has {key} in {dtype}, and adapters are float32 (F32)", _AGAIN)
        if shape not in expected[key]:
            raise bad(path, f"has {key} of size {shape} where its metadata says {expected[key][0]}", _AGAIN)
    if 0 in shapes.get("table.quantiles", [1]) or shapes.get("table.quantiles", [2])[-1] < 2:
        raise bad(path, "has an empty capacity table (table.quantiles)", _AGAIN)


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise bad(path, f"has numbers in {key} that are not finite (NaN or infinity)",
                       "its training went wrong or the file is damaged, so get another one")
        if key.startswith("table.") and (value.diff(dim=-1) < 0).any():
            raise bad(path, f"has a table {key} that does not rise", "calibrate the adapter again")
