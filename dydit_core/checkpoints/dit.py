"""What a DiT, SiT, Latte or DyDiT file holds, told from its keys and shapes; what those do not say, from its metadata or the user.

A Latte is a DiT with positions in time (see `latte`). Two things are not in the shapes. A DiT and a SiT have the same tensors, and
differ in what they predict. The number of attention heads shows in DyDiT's routers alone, where the file of December 2024 has one
output more than that of March 2025.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isqrt

import torch
from torch import Tensor

from ..models.dit import EPS, FLOW, DiT, DiTConfig
from ..models.latte import Latte, LatteConfig, network
from ..routers.dit import DiTRouters, Linears, TokenMLP
from .dit_keys import GROUPS, HEADS, TOKEN_DOWN, TOKEN_UP, RouterSizes, Sizes, base_shapes, diffusers_key, read_sizes, router_shapes
from .dit_table import KEYS, check_table, read_table
from .files import bad
from .latte import check_latte, check_pairs, seems_latte
from .source import AGAIN, Source, check_entries

PREDICTIONS = (EPS, FLOW)
# Of the variants S, B, L and XL, by width (DiT, arXiv 2212.09748, table 1).
_HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
# As their authors call the files that have no routers.
_NAMES = {EPS: ("DiT-XL-2-256x256", "DiT-XL-2-512x512"), FLOW: ("SiT-XL-2-256x256", "SiT-XL-2-256")}


@dataclass(frozen=True, eq=False)
class DiTFile:
    """`class_names`: of the classes in order, empty where the file does not say. `known_by`: what says that it predicts what it does.
    `calibrated`: it has the capacity table of its routers."""

    source: Source
    config: DiTConfig
    routers: RouterSizes | None
    class_names: tuple[str, ...] = ()
    known_by: str = ""
    calibrated: bool = False

    @property
    def title(self) -> str:
        return f"Dy{self.config.title}" if self.routers else self.config.title

    def __str__(self) -> str:
        config, sizes = self.config, self.routers
        shape = f"{8 * config.side}², {config.depth} blocks"
        if isinstance(config, LatteConfig):
            kinds = f"{config.depth // 2} spatial, {config.depth // 2} temporal"
            shape = f"{config.frames} frames of {shape} ({kinds})"
        drawn = f"{config.classes} classes" if config.classes else "unconditional"
        routers = f"routers for {sizes.heads} heads, {sizes.groups} channel groups and tokens" if sizes else "no routers"
        return f"{self.title}, {shape}, {drawn}, {routers}"

    @property
    def keys(self) -> list[str]:
        """Of the model, without the routers', as `models.dit` and `models.latte` name them; `source.entries[key].name` is the name in the file."""
        return list(base_shapes(self.config))

    @property
    def router_keys(self) -> list[str]:
        return list(router_shapes(self.config, self.routers)) if self.routers else []

    @property
    def table_keys(self) -> list[str]:
        return list(KEYS) if self.calibrated else []

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The model's tensors by key; each is valid until the next is asked for."""
        return self.source.tensors(self.keys)

    def read_model(self) -> DiT | Latte:
        """The model without its routers, frozen, in float32."""
        model = network(self.config)
        model.load_state_dict({key: tensor.float() for key, tensor in self.tensors()})
        return model.eval().requires_grad_(False)

    def read_routers(self) -> DiTRouters | None:
        """The routers, in float32, with their table where they are calibrated; None where the file has none. Raises FileError."""
        if self.routers is None:
            return None
        found = {}
        for key, tensor in self.source.tensors(self.router_keys):
            if not tensor.isfinite().all():
                raise bad(self.source.path, f"has numbers in {key} that are not finite (NaN or infinity)", AGAIN)
            found[key] = tensor.to(torch.float32, copy=True)

        def stacked(part: str) -> tuple[Tensor, Tensor]:
            return tuple(torch.stack([found[f"blocks.{block}.{part}.{end}"] for block in range(self.config.depth)]) for end in ("weight", "bias"))

        up, up_bias = stacked(TOKEN_UP)
        tokens = TokenMLP(*stacked(TOKEN_DOWN), up[:, 0], up_bias[:, 0])
        units = (Linears(*stacked(part)) for part in (HEADS, GROUPS))
        table = read_table(self.source) if self.calibrated else None
        routers = DiTRouters(*units, tokens, self.routers.heads, self.routers.groups, table)
        for part in (routers.heads, routers.groups, routers.tokens):
            part.requires_grad_(False)
        return routers


def find_dit(source: Source, prediction: str | None = None, heads: int | None = None) -> DiTFile:
    """The DiT or Latte in `source`, every key, size and type checked, from the header alone. Raises FileError.

    `prediction` (EPS or FLOW) and `heads` are what the user says; both go before what the file says.
    """
    path, kind = source.path, "DiT"
    if seems_latte(source.entries):
        kind = "Latte"
        check_latte(source)
    theirs = diffusers_key(source.entries)
    if theirs is not None:
        released = " or ".join(f"{name}.pt" for name in _NAMES[EPS])
        raise bad(path, f"is a DiT in diffusers' layout ({theirs})", f"take the file of DiT's authors ({released}), and run python -m dydit_core convert on it")
    sizes = read_sizes({key: entry.shape for key, entry in source.entries.items()})
    if isinstance(sizes, str):
        raise bad(path, f"is not a whole {kind}: it lacks a tensor {sizes} of a fitting size", AGAIN)
    if not sizes.frames and sizes.labels < 2:
        raise bad(path, "knows no class (y_embedder.embedding_table.weight has one row)", "choose a class-conditional DiT or SiT")
    count, routers = _units(source, sizes, heads)
    side = _side(source, sizes)
    if sizes.out_channels not in (sizes.in_channels, 2 * sizes.in_channels):
        raise bad(path, f"makes {sizes.out_channels} channels from {sizes.in_channels}, where a {kind} makes as many or twice as many "
                        "(final_layer.linear.weight)", AGAIN)
    shape = dict(hidden_size=sizes.width, depth=sizes.depth, num_heads=count, patch_size=sizes.patch, side=side,
                 in_channels=sizes.in_channels, classes=max(0, sizes.labels - 1), mlp_ratio=sizes.hidden / sizes.width,
                 learned_variance=sizes.out_channels == 2 * sizes.in_channels)
    config = LatteConfig(frames=sizes.frames, **shape) if sizes.frames else DiTConfig(**shape)
    calibrated = _check_tensors(source, config, routers)
    if sizes.frames:
        check_pairs(source, sizes.depth)
    predicts, known_by = _prediction(source, config, routers is not None, prediction)
    return DiTFile(source, replace(config, prediction=predicts), routers, _class_names(source, config.classes), known_by, calibrated)


def _side(source: Source, sizes: Sizes) -> int:
    """Latent rows and columns that the positions were made for."""
    rows = isqrt(sizes.positions)
    if rows * rows != sizes.positions:
        raise bad(source.path, f"has positions for {sizes.positions} tokens (pos_embed), which are no square", "choose a file for square pictures")
    return rows * sizes.patch


def _check_tensors(source: Source, config: DiTConfig, routers: RouterSizes | None) -> bool:
    """Whether a capacity table is among them. Raises FileError."""
    base, added = base_shapes(config), router_shapes(config, routers) if routers else {}
    check_entries(source, base, "tensors of the model")
    if added:
        check_entries(source, added, "routers")
    extra = sorted(set(source.entries) - set(base) - set(added) - set(KEYS))
    if extra:
        raise bad(source.path, f"has a tensor {extra[0][:80]} that no DiT, SiT, Latte or DyDiT has", "choose a file of one of those")
    return check_table(source, config.depth if routers else 0)


def _units(source: Source, sizes: Sizes, said: int | None) -> tuple[int, RouterSizes | None]:
    """Number of attention heads, and what the routers decide."""
    path, width, outputs = source.path, sizes.width, sizes.head_outputs
    told = _number(source, "heads") if said is None else said
    if told is not None and (told < 1 or width % told):
        raise bad(path, f"has a width of {width}, which does not part into {told} heads", "say another number with --heads")
    if not outputs:
        heads = told or _HEADS.get(width)
        if heads is None:
            raise bad(path, f"does not say into how many attention heads its width of {width} parts (only 384, 768, 1024 and 1152 are known)",
                      "say it: python -m dydit_core convert FILE OUT.safetensors --heads NUMBER")
        return heads, None
    # March 2025: unit 0 is always on and has no output; December 2024: it has.
    fitting = {outputs + less: less == 1 for less in (0, 1)
               if width % (outputs + less) == 0 and sizes.hidden % (sizes.group_outputs + less) == 0}
    if not fitting:
        raise bad(path, f"has routers of {outputs} heads and {sizes.group_outputs} channel groups, into which neither its width of {width} "
                        f"nor its MLP of {sizes.hidden} channels parts, with one more that is always on or without", AGAIN)
    likely = told or _HEADS.get(width)
    heads = likely if likely in fitting or told else next(iter(fitting)) if len(fitting) == 1 else None
    if heads is None:
        raise bad(path, f"has routers of {outputs} outputs, which may stand for {outputs} heads or, the first being always on, for {outputs + 1}",
                  f"say which: python -m dydit_core convert FILE OUT.safetensors --heads {outputs} (or {outputs + 1})")
    if heads not in fitting:
        raise bad(path, f"has routers of {outputs} outputs, which do not fit {heads} heads", f"its heads are {' or '.join(map(str, fitting))}")
    always_on = fitting[heads]
    return heads, RouterSizes(heads, sizes.group_outputs + always_on, sizes.router_hidden, always_on)


def _prediction(source: Source, config: DiTConfig, routed: bool, said: str | None) -> tuple[str, str]:
    """What the network predicts, and what says so."""
    path, written, trained = source.path, source.metadata.get("prediction"), str(source.arguments.get("model", ""))
    if said is not None:
        return said, "you say so"
    if written is not None:
        if written not in PREDICTIONS:
            raise bad(path, f"has prediction={written[:40]!r} in its metadata, which is neither {EPS} nor {FLOW}", AGAIN)
        return written, "its metadata say so"
    if trained.startswith("SiT"):
        way = tuple(str(source.arguments.get(key))[:40] for key in ("path_type", "prediction"))
        if way != ("Linear", "velocity"):
            raise bad(path, f"was trained along the path {way[0]} to predict {way[1]}, and SiT runs here along the path Linear, predicting velocity",
                      "choose a SiT trained with its default settings")
        return FLOW, f"it was trained with --model {trained}"
    if trained.startswith("DiT"):
        return EPS, f"it was trained with --model {trained}"
    if isinstance(config, LatteConfig):
        return EPS, "every Latte of its authors does"
    if routed and config.learned_variance:  # as theirs have, and no SiT of this pack's training has
        return EPS, "DyDiT's authors released DiTs alone"
    for prediction, names in _NAMES.items():
        if path.stem in names:
            return prediction, "it is called as the authors' file"
    raise bad(path, f"is {'Dy' if routed else ''}{config.title} or its SiT twin, whose tensors have the same names and sizes",
              f"say which: python -m dydit_core convert FILE OUT.safetensors --prediction {EPS} (DiT; the authors' files are called "
              f"{' and '.join(_NAMES[EPS])}) or --prediction {FLOW} (SiT; {_NAMES[FLOW][0]})")


def _number(source: Source, key: str) -> int | None:
    """A size from the metadata."""
    text = source.metadata.get(key)
    if text is None:
        return None
    # isdecimal alone accepts digits of every script.
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 6 else 0
    if number < 1:
        raise bad(source.path, f"has {key}={text[:40]!r} in its metadata, which is not a number of {key}", AGAIN)
    return number


def _class_names(source: Source, classes: int) -> tuple[str, ...]:
    """From the metadata: JSON, a list of names or their number alone."""
    text = source.metadata.get("classes", str(classes))
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    named = isinstance(found, list) and all(isinstance(name, str) for name in found)
    if not named and (isinstance(found, bool) or not isinstance(found, int)):
        raise bad(source.path, f"has classes={text[:40]!r} in its metadata, which are neither names nor a number", AGAIN)
    count = len(found) if named else found
    if count != classes:
        raise bad(source.path, f"has {count} classes in its metadata and {classes} in its tensors", AGAIN)
    return tuple(found) if named else ()
