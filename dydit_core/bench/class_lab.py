"""The quality tables' pictures by class: the small DyDiT and DySiT, under their own routers and under what needs none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import bad
from ..demo.autoencoder import CHANNELS
from ..demo.checker import Checker
from ..demo.class_data import FRESH, PICTURES
from ..demo.class_model import ClassModel, load_class_model
from ..demo.classes import NAMES, recognized
from ..demo.data import LATENT
from ..demo.files import CLASS_VAE_FILE, class_file
from ..demo.vae import load_decoder
from ..routers.change import ChangeRouter
from ..routers.random import RandomRouter
from ..runtime import Method
from ..substitutes.history import Reuse
from ..substitutes.nothing import Nothing
from .contenders import OPEN, Contender
from .lab import Lab

FILES = {"DyDiT": class_file("dit"), "DySiT": class_file("sit")}
# The file's threshold decides, so there is one such row for all budgets.
OWN = "its own decisions"


class ClassLab(Lab):
    """`models` by the names in FILES, those whose file is there. Classes take turns. Raises FileError."""

    size = (CHANNELS, LATENT, LATENT)

    def _open(self, weights: Path) -> None:
        found = {name: weights / file for name, file in FILES.items() if (weights / file).exists()}
        if not found:
            raise bad(weights, "holds neither a small DyDiT nor a small DySiT", "make them: python -m dydit_core.demo.make_dit")
        self.drawn: dict[str, ClassModel] = {name: load_class_model(path) for name, path in found.items()}
        self.models = {name: one.model for name, one in self.drawn.items()}
        self.decoder = load_decoder(weights / CLASS_VAE_FILE)
        self.conditioning = (torch.arange(self.settings.prompts) % len(NAMES),)
        self.uncond = (torch.tensor([len(NAMES)]),)
        self.contenders = {name: dict(_contenders(one, found[name])) for name, one in self.drawn.items()}

    def files(self, model: str) -> list[Path]:
        return [CLASS_VAE_FILE, FILES[model]]

    def schedule(self, model: str) -> Callable[[int], list[float]]:
        return self.drawn[model].schedule

    def accuracy(self, images: Tensor, checker: Checker) -> float:
        """Share of the pictures that show their class."""
        return recognized(images, self.conditioning[0], checker).float().mean().item()

    def real(self, first: int, last: int) -> Tensor:
        return PICTURES.drawn(FRESH + first, FRESH + last)


def _contenders(drawn: ClassModel, file: Path) -> Iterator[tuple[str, Contender]]:
    if drawn.routers is not None:
        yield OWN, Contender(Method(drawn.routers.by_threshold(), Nothing()), OPEN, file)
        yield "its routers × nothing", Contender(Method(drawn.routers, Nothing()), "its routers", file)
    yield "changed × reuse", Contender(Method(ChangeRouter(), Reuse()), "changed")
    yield "random × nothing", Contender(Method(RandomRouter(), Nothing()), "random")
