"""DiT, SiT and Latte as bases of a training: read from their file with all that is known of it, and asked for classes by number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..checkpoints.dit import DiTFile, find_dit
from ..checkpoints.dit_keys import seems_dit
from ..checkpoints.source import open_source
from ..models.dit import EPS
from ..models.latte import network
from .examples import Examples
from .recompute import Recomputed
from .settings import SettingError, Settings, flag
from .teacher import Teacher, dit_teacher


def find_class_base(path: Path) -> DiTFile | None:
    """The DiT, SiT or Latte in `path`, from its header; None where it holds something else. Raises FileError."""
    source = open_source(path)
    return find_dit(source) if seems_dit(source.entries) else None


def check_settings(settings: Settings, base: DiTFile) -> None:
    """Raises SettingError where something was asked for that such a base does not take."""
    name = base.config.title
    for other in ("prompts", "images", "examples", "lora"):
        if getattr(settings, other) is not None:
            raise SettingError(f"{flag(other)} is for FLUX, and {base.source.path.name} is a {name}, which takes --classes alone.")
    if not base.config.classes and (settings.classes is not None or settings.cfg[-1] != 1):
        given = "classes" if settings.classes is not None else "cfg"
        raise SettingError(f"{flag(given)} is for models of classes, and {base.source.path.name} is an unconditional {name}; take it out.")
    if settings.shift is not None and base.config.prediction == EPS:
        raise SettingError(f"--shift is for flow matching, and {base.source.path.name} is a {name}; take it out.")


def class_examples(base: DiTFile, chosen: Sequence[str]) -> Examples:
    """The classes `chosen` by number or by the names in the file, all where there are none. Raises SettingError.

    An unconditional base takes no notice of the one number that it is given.
    """
    numbers = [_number(base, word) for word in chosen] or range(base.config.classes or 1)
    return Examples((torch.tensor(list(numbers)),), (torch.tensor([base.config.classes]),))


def _number(base: DiTFile, word: str) -> int:
    if word in base.class_names:
        return base.class_names.index(word)
    if word.isascii() and word.isdecimal() and int(word) < base.config.classes:
        return int(word)
    names = f"; its names are {', '.join(base.class_names[:20])}" if base.class_names else ""
    raise SettingError(f"--classes has {word!r}; {base.source.path.name} has classes 0 to {base.config.classes - 1}{names}.")


def class_teacher(base: DiTFile, device: torch.device, products: torch.dtype, checkpointing: bool) -> Teacher:
    """Held in single precision, without the file's own routers."""
    model = network(base.config)
    model.load_state_dict({key: tensor.float() for key, tensor in base.tensors()})
    teacher = dit_teacher(model.to(device).eval().requires_grad_(False), products)
    return replace(teacher, family=Recomputed(teacher.family)) if checkpointing else teacher
