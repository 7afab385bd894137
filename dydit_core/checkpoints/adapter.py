"""Our adapter file: a learned token router (SDT) for one FLUX layout, in a single `.safetensors`.

Tensors, all float32; B = gated blocks (double, then single), W = width, R = rank, S = sigma bins, L = levels:

    scores.weight [B, W]   scores.text [B, W]   scores.down [B, R, W]   scores.up [B, W, R]
    scores.slope [B, R]    scores.bias [B]                              see `routers.token.TokenScores`
    table.quantiles [B, S, L]   table.edges [S]                         see `routers.token.CapacityTable`

Metadata, all strings:

    format, version                dydit-adapter, 1
    family, width, rank, double, single   the layout of the base model; it must be the same to be used
    base                           JSON {parameter: [mean, root mean square]}: small tensors of the base (`sketch`)
    substitutes, budgets           comma-separated: what stood in during training; budgets checked after calibration
    training                       JSON: steps, seed, losses, …
    modelspec.*                    Stability AI ModelSpec 1.0.1: title, architecture, description, license, date, …

A layout that differs is an error; base weights that differ are only worth a warning, since fine-tunes keep the layout
and mostly keep the router working. Everything in the header is checked before a tensor is read.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..routers.token import CapacityTable, TokenScores

FORMAT, VERSION = "dydit-adapter", "1"
_MODELSPEC = "modelspec."
_IMPLEMENTATION = "https://arxiv.org/abs/2504.06803"
_KEYS = ("scores.weight", "scores.text", "scores.down", "scores.up", "scores.slope", "scores.bias", "table.quantiles",
         "table.edges")
_NUMBERS = ("width", "rank", "double", "single")
_WORDS = ("family", "base", "substitutes", "budgets", "training", "modelspec.title")
_AGAIN = "get the adapter again from where it was published"

# A mean may move by 3 % of the root mean square, plus half an fp8 (e4m3) subnormal step: what a cast to fp8 does.
_RELATIVE, _ABSOLUTE = 0.03, 2.0**-10

Sketch = Mapping[str, tuple[float, float]]


class AdapterError(ValueError):
    """One sentence: the file, the key, what is wrong with it, and what to do."""


@dataclass(frozen=True)
class Facts:
    """What the file says about itself. `double`, `single`: blocks of the base model; `base`: its `sketch`."""

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

    def refusal(self, width: int, double: int, single: int) -> str | None:
        """Why a model of this layout cannot use the adapter, or None."""
        here, there = (width, double, single), (self.width, self.facts.double, self.facts.single)
        if here == there:
            return None
        return f'the adapter "{self.facts.title}" was made for a model of {_layout(*there)}; this one has {_layout(*here)}'

    def warning(self, model: nn.Module) -> str | None:
        """That the weights of `model` are not the ones the adapter was trained on, or None."""
        found = sketch(model)
        for name, (mean, rms) in self.facts.base.items():
            slack = _RELATIVE * rms + _ABSOLUTE
            # Written so that a NaN counts as different.
            if name not in found or not all(abs(a - b) <= slack for a, b in zip(found[name], (mean, rms))):
                return (f'the adapter "{self.facts.title}" was trained on other weights of the same layout ({name} '
                        f"differs); a fine-tune usually works, so compare one image with the budget at 1.0")
        return None


def _layout(width: int, double: int, single: int) -> str:
    return f"width {width} with {double} double and {single} single blocks"


def sketch(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Mean and root mean square of a few small tensors: the same for one model in fp32, bf16, fp16 or fp8.

    Reads some kilobytes whatever the size of `model`; LoRAs, which are not in the weights, leave it as it is.
    """
    names = ["img_in.bias", "txt_in.bias", "time_in.in_layer.bias", "final_layer.linear.bias"]
    for stack, norm in (("double_blocks", "img_attn.norm"), ("single_blocks", "norm")):
        last = len(getattr(model, stack)) - 1
        chosen = sorted({0, last // 2, last}) if last >= 0 else []
        names += [f"{stack}.{index}.{norm}.{part}_norm" for index in chosen for part in ("query", "key")]
    found = {}
    for name in names:
        tensor = _small_tensor(model, name)
        if tensor is not None:
            values = tensor.detach().float()
            found[name] = (float(values.mean()), float(values.square().mean().sqrt()))
    return found


def _small_tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter `name`; an RMSNorm's is `weight` in torch and `scale` in the released files."""
    path = name if name.endswith(".bias") else f"{name}.weight"
    here: Any = model
    for part in path.split("."):
        here = getattr(here, part, None) if part != "weight" else getattr(here, "weight", getattr(here, "scale", None))
    return here if isinstance(here, Tensor) and not here.is_meta else None


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
    """The adapter in `path`, on the CPU, frozen. Raises AdapterError."""
    path = Path(path)
    _check_kind(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            facts, sizes = _facts(path, file.metadata() or {})
            _check_tensors(path, file, facts, *sizes)
            # Cloned: a view would keep the file mapped, and Windows cannot replace a mapped file.
            tensors = {key: file.get_tensor(key).clone() for key in _KEYS}
    except SafetensorError as error:
        raise _bad(path, f"is damaged or not a safetensors file ({error})", "download it again") from None
    _check_values(path, tensors)
    with torch.device("meta"):
        scores = TokenScores(facts.double + facts.single, *sizes)
    scores.load_state_dict({key[7:]: tensors[key] for key in _KEYS if key.startswith("scores.")}, assign=True)
    table = CapacityTable(tensors["table.quantiles"], tensors["table.edges"])
    return Adapter(scores.requires_grad_(False), table, facts)


def _bad(path: Path, problem: str, remedy: str) -> AdapterError:
    return AdapterError(f"{path.name} {problem}; {remedy}.")


def _check_kind(path: Path) -> None:
    if not path.is_file():
        raise _bad(path, f"is not a file ({path})", "choose an adapter in ComfyUI/models/dydit")
    with open(path, "rb") as file:
        start = file.read(9)
    if start[:2] in (b"PK", b"\x80\x02"):
        raise _bad(path, "is a PyTorch file (.pt), whatever its name says", "choose the .safetensors of the adapter")
    if start[8:] != b"{":
        raise _bad(path, "is not a safetensors file", "download the adapter again, or choose another file")


def _facts(path: Path, metadata: dict[str, str]) -> tuple[Facts, tuple[int, int]]:
    """Facts, and (width, rank)."""
    if metadata.get("format") != FORMAT:
        raise _bad(path, f"is a safetensors file but no DyDiT adapter (its metadata lacks format={FORMAT})",
                   "a LoRA or a model has its own loader, so choose a file made for DyDiT")
    if metadata.get("version") != VERSION:
        raise _bad(path, f"has version {metadata.get('version')!r} of the adapter format, and this is version {VERSION}",
                   "update DyDiT for ComfyUI, or get the file in this version")
    for key in (*_NUMBERS, *_WORDS):
        if key not in metadata:
            raise _bad(path, f"lacks the metadata key {key}", _AGAIN)
    numbers = {}
    for key in _NUMBERS:
        text = metadata[key]
        # isdecimal alone accepts digits of every script.
        size = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else -1
        if size < (0 if key == "single" else 1):
            raise _bad(path, f"has {key}={text[:40]!r} in its metadata, which is not a size", _AGAIN)
        numbers[key] = size
    facts = Facts(
        double=numbers["double"],
        single=numbers["single"],
        title=metadata["modelspec.title"],
        family=metadata["family"],
        substitutes=tuple(filter(None, metadata["substitutes"].split(","))),
        budgets=_read(path, metadata, "budgets", lambda text: tuple(float(part) for part in text.split(",") if part)),
        base=_read(path, metadata, "base", _read_sketch),
        training=_read(path, metadata, "training", lambda text: dict(json.loads(text))),
        **{key: metadata.get(_MODELSPEC + key, "") for key in ("description", "license", "date")},
    )
    return facts, (numbers["width"], numbers["rank"])


def _read(path: Path, metadata: dict[str, str], key: str, parse: Any) -> Any:
    try:
        return parse(metadata[key])
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise _bad(path, f"has a metadata key {key} that cannot be read ({metadata[key][:40]!r})",
                   _AGAIN) from None


def _read_sketch(text: str) -> dict[str, tuple[float, float]]:
    pairs = {str(name): tuple(float(number) for number in pair) for name, pair in json.loads(text).items()}
    if any(len(pair) != 2 for pair in pairs.values()):
        raise ValueError("a sketch is pairs of numbers")
    return pairs


def _check_tensors(path: Path, file: Any, facts: Facts, width: int, rank: int) -> None:
    """Names, types and sizes against the metadata; reads the header only."""
    found = set(file.keys())
    for key in _KEYS:
        if key not in found:
            raise _bad(path, f"lacks the tensor {key}", _AGAIN)
    for key in sorted(found - set(_KEYS)):
        raise _bad(path, f"has a tensor {key[:80]} that no adapter of version {VERSION} has", _AGAIN)
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
            raise _bad(path, f"has {key} in {piece.get_dtype()}, and adapters are float32 (F32)", _AGAIN)
        if piece.get_shape() != expected[key]:
            raise _bad(path, f"has {key} of size {piece.get_shape()} where its metadata says {expected[key]}", _AGAIN)
    if not bins[0] or levels[0] < 2:
        raise _bad(path, "has an empty capacity table (table.quantiles)", _AGAIN)


def _check_values(path: Path, tensors: dict[str, Tensor]) -> None:
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise _bad(path, f"has numbers in {key} that are not finite (NaN or infinity)",
                       "its training went wrong or the file is damaged, so get another one")
        if key.startswith("table.") and (value.diff(dim=-1) < 0).any():
            raise _bad(path, f"has a table {key} that does not rise", "calibrate the adapter again")
