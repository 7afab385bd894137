"""The transformer behind a MODEL: its sizes in one forward, and what the host's batch rows are."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor, nn

from ..dydit_core.families.known import family_of
from ..dydit_core.parts import Extent, Geometry
from ..dydit_core.runtime import Branches
from . import report
from .backend import ComfyBackend

BACKEND = ComfyBackend()
_COND = 0


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind a compiled one."""
    return getattr(model, "_orig_mod", model)


def token_grid(model: nn.Module, latent_shape: Sequence[int]) -> tuple[int, ...]:
    """Token rows and columns of a latent [rows, channels, height, width], whose edges are padded to whole tokens; before them
    the frames of a video [rows, channels, frames, height, width]."""
    patch = getattr(model, "patch_size", 2)
    return *latent_shape[2:-2], -(-latent_shape[-2] // patch), -(-latent_shape[-1] // patch)


def image_tokens(model: nn.Module, latent_shape: Sequence[int], references: list[Tensor] | None) -> int:
    """Of the picture and of its reference images."""
    return sum(prod(token_grid(model, shape)) for shape in (latent_shape, *(latent.shape for latent in references or ())))


def geometry_of(model: nn.Module, x: Tensor, context: Tensor | None, references: list[Tensor] | None) -> tuple[Geometry, tuple[int, ...]]:
    """Sizes and the picture's token grid; `context` is None where a model takes no text."""
    grid, count = token_grid(model, x.shape), image_tokens(model, x.shape, references)
    return family_of(model).geometry(model, count, context), grid


def branches_of(options: dict, rows: int) -> Branches:
    """Which batch rows are cond; ComfyUI joins uncond and cond into one batch where it can."""
    kinds = options.get("cond_or_uncond") or [_COND]
    each, keys = rows // len(kinds), tuple(options.get("uuids") or kinds)
    cond = [index for index, kind in enumerate(kinds) if kind == _COND]
    if not cond:
        return Branches(keys, slice(0, 0), slice(0, rows))
    start, stop = cond[0] * each, (cond[-1] + 1) * each
    if (stop - start) != len(cond) * each or (start > 0 and stop < rows):
        return Branches(keys, slice(0, rows), slice(rows, rows))  # not two runs of rows: every row alike
    return Branches(keys, slice(start, stop), slice(stop, rows) if start == 0 else slice(0, start))


def extent_of(model: nn.Module, geometry: Geometry, sigmas: int, prompts: int, dtype: torch.dtype) -> Extent:
    """What decides how much memory a run holds."""
    family = family_of(model)
    blocks = family.blocks(model)
    weights = sum(layer.weight.nbytes for block in blocks for name, layer in family.layers(block).items()
                  if name in family.cut_by_width and BACKEND.unsliceable(layer) is None)
    return Extent(geometry, len(blocks), sigmas, prompts, dtype.itemsize, weights)


def whole_layers(model: nn.Module, widths: bool) -> tuple[str, ...]:
    """Sentences on the layers that a method would cut and cannot."""
    family, lines = family_of(model), []
    for how, names in (("on every token", family.cut_by_tokens), ("at full width", family.cut_by_width if widths else ())):
        whole: dict[str, list[str]] = {}
        for block in family.blocks(model):
            for name in family.layers(block).keys() & set(names):
                reason = BACKEND.unsliceable(block.get_submodule(name))
                if reason is not None:
                    whole.setdefault(reason, []).append(name)
        lines += [report.whole_layers(how, layers, reason) for reason, layers in whole.items()]
    return tuple(lines)
