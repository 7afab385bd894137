"""Which base model a file belongs to: a layout that must be the same, and a sketch of weights that should be.

A layout that differs is an error; base weights that differ are only worth a warning, since fine-tunes keep the layout
and mostly keep the router working.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

# A mean may move by 3 % of the root mean square, plus half an fp8 (e4m3) subnormal step: what a cast to fp8 does.
_RELATIVE, _ABSOLUTE = 0.03, 2.0**-10

FLUX = "FLUX"

Sketch = Mapping[str, tuple[float, float]]


@dataclass(frozen=True)
class Layout:
    """Width, and the numbers of double and single blocks. `kind`: FLUX, or the `kind` of a DiT's config, as `SiT/2`; those
    have single blocks alone."""

    width: int
    double: int
    single: int
    kind: str = FLUX

    @property
    def blocks(self) -> int:
        return self.double + self.single

    def __str__(self) -> str:
        blocks = f"{self.double} double and {self.single} single" if self.kind == FLUX else self.single
        return f"{self.kind} of width {self.width} with {blocks} blocks"


@dataclass(frozen=True)
class Fit:
    """The base model that the file called `title` was made for; `base` is its `sketch`."""

    title: str
    layout: Layout
    base: Sketch = field(default_factory=dict)

    def refusal(self, here: Layout) -> str | None:
        """Why a model of this layout cannot use the file, or None."""
        if here == self.layout:
            return None
        return f'the adapter "{self.title}" was made for a {self.layout}; this model is a {here}'

    def warning(self, model: nn.Module) -> str | None:
        """That the weights of `model` are not the ones the file was trained on, or None."""
        found = sketch(model)
        for name, (mean, rms) in self.base.items():
            slack = _RELATIVE * rms + _ABSOLUTE
            # Written so that a NaN counts as different.
            if name not in found or not all(abs(a - b) <= slack for a, b in zip(found[name], (mean, rms))):
                return (f'the adapter "{self.title}" was trained on other weights of the same layout ({name} '
                        f"differs); a fine-tune usually works, so compare one image with the budget at 1.0")
        return None


def layout_of(model: nn.Module, width: int) -> Layout:
    """Of a FLUX, a DiT or a Latte of this width."""
    if hasattr(model, "double_blocks"):
        return Layout(width, len(model.double_blocks), len(model.single_blocks))
    return Layout(width, 0, len(model.blocks), model.config.kind)


def sketch(model: nn.Module) -> dict[str, tuple[float, float]]:
    """Mean and root mean square of a few small tensors: the same for one model in fp32, bf16, fp16 or fp8.

    Reads some kilobytes whatever the size of `model`; LoRAs, which are not in the weights, leave it as it is.
    """
    layout = layout_of(model, 0)
    return sketch_of(lambda name: _small_tensor(model, name), layout.double, layout.single)


def sketch_of(find: Callable[[str], Tensor | None], double: int, single: int) -> dict[str, tuple[float, float]]:
    """`sketch` of what `find` gives for names such as `img_in.bias` and `single_blocks.0.norm.query_norm`."""
    found = {}
    for name in _flux_names(double, single) if double else _dit_names(single):
        tensor = find(name)
        if tensor is not None:
            values = tensor.detach().float()
            found[name] = (float(values.mean()), float(values.square().mean().sqrt()))
    return found


def _flux_names(double: int, single: int) -> list[str]:
    stacks = ("double_blocks", double, "img_attn.norm"), ("single_blocks", single, "norm")
    return ["img_in.bias", "txt_in.bias", "time_in.in_layer.bias", "final_layer.linear.bias",
            *(f"{stack}.{index}.{norm}.{part}_norm" for stack, count, norm in stacks for index in _some(count) for part in ("query", "key"))]


def _dit_names(blocks: int) -> list[str]:
    return ["x_embedder.proj.bias", "t_embedder.mlp.0.bias", "final_layer.linear.bias",
            *(f"blocks.{index}.{layer}.bias" for index in _some(blocks) for layer in ("attn.qkv", "mlp.fc2"))]


def _some(count: int) -> list[int]:
    """The first, the middle and the last of `count`."""
    return sorted({0, (count - 1) // 2, count - 1}) if count else []


def read_sketch(pairs: Any) -> Sketch:
    """A sketch from the JSON of a file; raises ValueError, TypeError or AttributeError if it is none."""
    found = {str(name): tuple(float(number) for number in pair) for name, pair in pairs.items()}
    if any(len(pair) != 2 for pair in found.values()):
        raise ValueError("a sketch is pairs of numbers")
    return found


def _small_tensor(model: nn.Module, name: str) -> Tensor | None:
    """The parameter `name`; an RMSNorm's is `weight` in torch and `scale` in the released files."""
    path = name if name.endswith(".bias") else f"{name}.weight"
    here: Any = model
    for part in path.split("."):
        here = getattr(here, part, None) if part != "weight" else getattr(here, "weight", getattr(here, "scale", None))
    return here if isinstance(here, Tensor) and not here.is_meta else None
