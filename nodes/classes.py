"""A class as CONDITIONING, for models that draw classes and no prompts.

The class lies in the tensor, [labels, 1, 2], as its number and 1 more, and the square of that; 0 is no class. So Conditioning
Zero Out makes of it what it makes of a prompt, a prompt is known by its shape, and a mix of classes by a square that is none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..dydit_core.imagenet import imagenet
from ..dydit_core.models.dit import DiTConfig

NODE = "DyDiT Class Label"
_NAME = "dydit_class"
_SOME = 5


def conditioning(number: int | None, name: str = "") -> list:
    """CONDITIONING of class `number`, None for no class. `name`: the one that was chosen by it, to be held to the model's."""
    code = 0.0 if number is None else number + 1.0
    return [[torch.tensor([[[code, code**2]]], dtype=torch.float64), {_NAME: name}]]  # float32 holds squares to 4096 alone


def is_class(cond: Mapping[str, Any]) -> bool:
    """Whether a prepared condition of the host came of `conditioning`."""
    return _NAME in cond


def labels_of(cond: Mapping[str, Any], config: DiTConfig, names: tuple[str, ...]) -> Tensor:
    """Labels [n] of int64 in a prepared condition of the host, for a model of `config` with classes of these names (none: ImageNet's).

    Raises ValueError with a sentence for what is no class of this model.
    """
    code, title = cond.get("cross_attn"), config.title
    if code is None or code.ndim != 3 or code.shape[2] != 2:
        sockets = cond.get("prompt_type", "positive and negative")
        raise ValueError(f"This {title} draws classes and no prompts, and {sockets} has a prompt; connect {NODE} there.")
    codes = code[..., :1].round()
    # Not to the last bit: Conditioning Average of a class and itself is that class, to rounding.
    if code.shape[1] != 1 or not torch.allclose(code, torch.cat((codes, codes**2), dim=2), rtol=0, atol=1e-3):
        raise ValueError(f"This {title} draws one class at a time, and another node mixed two; take Conditioning Average or Concat out.")
    numbers = codes[:, 0, 0].long().cpu() - 1
    for number in numbers[numbers >= 0].tolist():
        _check(number, cond.get(_NAME, ""), config, names)
    return torch.where(numbers < 0, config.classes, numbers)


def _check(number: int, name: str, config: DiTConfig, names: tuple[str, ...]) -> None:
    known = names or (imagenet() if config.classes == len(imagenet()) else ())
    if name in known and known.index(name) != number:
        raise ValueError(f'{NODE}: "{name}" is number {known.index(name)} of this {config.title}, and the label says {number}; give the number alone.')
    if name and name not in known:
        some = ", ".join(known[:_SOME]) + (", …" if len(known) > _SOME else "")
        own = f"{config.classes} classes ({some}); choose one of them, or give its number" if known else f"{config.classes} classes without names; choose by number"
        raise ValueError(f'{NODE}: "{name}" is no class of this {config.title}, which has {own}.')
    if number >= config.classes:
        raise ValueError(f"{NODE}: number is {number}, and this {config.title} has classes 0 to {config.classes - 1}.")
