"""Where the quality tables' pictures are drawn: the demo model and its few-step twin, held-out prompts, fixed noise.

Dense pictures are kept in a folder, as latents: every row of a table is held to them, in every process.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..budget import Plan, forecast
from ..demo.base import load_base
from ..demo.checker import Checker, accuracy, fresh_scenes
from ..demo.codec import CHANNELS
from ..demo.data import LATENT, draw
from ..demo.files import BASE_FILE, TWIN_FILE, VAE_FILE, WEIGHTS
from ..demo.heldout import held_out, held_out_prompts
from ..demo.prompt import encode_batch
from ..demo.vae import decode, load_decoder
from ..families.known import family_of
from ..lora import load_lora, merge
from ..parts import BlockCost, Geometry
from ..sampling import sample, sigmas
from ..standalone import BACKEND, Budgeted
from ..storage import write_atomically
from ..train.base import prefer_plain_attention
from .contenders import SHIPPED, SHIPPED_TWIN, Contender, contenders, flux_cuts, shipped

NOISE_SEED, OTHER_SEED = 11, 12
BASE, TWIN = "base", "twin"
SCENES = "scenes"  # no model: the scenes of the prompts, drawn as training pictures are
PROMPTS, CLASSES, VIDEOS = "prompts", "classes", "videos"  # what is drawn: pictures of prompts or of classes, videos of classes


@dataclass(frozen=True)
class Settings:
    """What a lab is set up with, in any process.

    `folder`: what need not be made twice. `of`: PROMPTS (a `Lab`), CLASSES (a `class_lab.ClassLab`) or VIDEOS (a `video_lab.VideoLab`);
    `prompts` is how many of any.
    `adapters`: files by the names of their rows, those of `twin_adapters` for the twin
    alone. `alone`: nothing of ours runs beside it, so that seconds mean something.
    """

    folder: Path
    prompts: int = 256
    cfg: float = 1.0
    bfloat16: bool = False
    batch: int = 16
    weights: Path = WEIGHTS
    adapters: Mapping[str, Path] = field(default_factory=dict)
    twin_adapters: Mapping[str, Path] = field(default_factory=dict)
    alone: bool = True
    of: str = PROMPTS


@dataclass(frozen=True)
class Shot:
    """One picture or video of every prompt. `model`: BASE, TWIN or SCENES; `method`: a contender, "" for dense; `seed` of the noise."""

    model: str
    steps: int
    method: str = ""
    budget: float = 1.0
    seed: int = NOISE_SEED

    @property
    def is_dense(self) -> bool:
        return not self.method and self.model != SCENES


@dataclass(frozen=True)
class Taken:
    """Latents [prompts, C, …, H, W], the budget they spent, and seconds for one of them where nothing ran beside."""

    latents: Tensor
    spent: float
    seconds: float | None


class Lab:
    """`models` and what runs on each, by BASE and (where its file is there) TWIN. A lab of other models overrides `_open` and what
    says what its pictures are of."""

    decoder: nn.Module
    models: dict[str, nn.Module]
    contenders: dict[str, dict[str, Contender]]
    # What the models are given for each picture, and for none of it (one row).
    conditioning: tuple[Tensor, ...]
    uncond: tuple[Tensor, ...]
    # Of one latent.
    size: tuple[int, ...] = (CHANNELS, LATENT, LATENT)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        prefer_plain_attention()
        with self._products():
            self._open(settings.weights)
        self.decoder.to(memory_format=torch.channels_last)

    def _open(self, weights: Path) -> None:
        settings = self.settings
        self.decoder = load_decoder(weights / VAE_FILE)
        self.scenes = held_out(settings.prompts)
        self.conditioning = encode_batch(held_out_prompts(settings.prompts))
        self.uncond = encode_batch([""])
        self.models = {BASE: load_base(weights / BASE_FILE)}
        if (weights / TWIN_FILE).exists():
            self.models[TWIN] = load_base(weights / BASE_FILE)
            merge(self.models[TWIN], load_lora(weights / TWIN_FILE))
        files = shipped(weights, SHIPPED) | dict(settings.adapters)
        more: dict[str, Mapping[str, Path]] = {BASE: {}, TWIN: {**shipped(weights, SHIPPED_TWIN), **settings.twin_adapters}}
        self.contenders = {name: contenders(files | dict(more[name]), flux_cuts(model)) for name, model in self.models.items()}

    def files(self, model: str) -> list[Path]:
        """In the folder of weights, those that decide what `model` draws."""
        return [VAE_FILE, *{BASE: [BASE_FILE], TWIN: [BASE_FILE, TWIN_FILE], SCENES: []}[model]]

    def schedule(self, model: str) -> Callable[[int], list[float]]:
        """Sigmas by the number of steps."""
        return sigmas

    def accuracy(self, images: Tensor, checker: Checker) -> float:
        """Share of what the pictures were asked for that `checker` sees in them, 0…1."""
        return accuracy(images, self.scenes, checker)["mean"]

    def real(self, first: int, last: int) -> Tensor:
        """Freshly drawn pictures number `first` … `last` − 1."""
        return draw(fresh_scenes(last)[first:])

    def key(self, shot: Shot) -> dict[str, Any]:
        """Everything that decides the pictures of `shot`, but our own code."""
        settings = self.settings
        paths = [settings.weights / file for file in self.files(shot.model)]
        if shot.method and (adapter := self.contenders[shot.model][shot.method].file):
            paths.append(adapter)
        return {**asdict(shot), "prompts": settings.prompts, "cfg": settings.cfg, "bfloat16": settings.bfloat16,
                "batch": settings.batch, "files": [digest(path) for path in paths]}

    def pictures(self, shot: Shot) -> tuple[Tensor, float, float | None]:
        """Images [prompts, …, 3, H, W], the budget they spent, seconds of sampling for one of them."""
        if shot.model == SCENES:
            return draw(self.scenes), 0.0, None
        taken = self.take(shot)
        return self.decoded(taken.latents), taken.spent, taken.seconds

    def decoded(self, latents: Tensor) -> Tensor:
        """What is seen in latents."""
        return decode(latents.contiguous(memory_format=torch.channels_last), self.decoder).contiguous()

    def take(self, shot: Shot) -> Taken:
        """Sample, or open dense latents that were sampled before."""
        if not shot.is_dense:
            return self._sample(shot)
        name = hashlib.sha256(json.dumps(self.key(shot)).encode()).hexdigest()[:16]
        file = self.settings.folder / f"dense_{name}.pt"
        if not file.exists():
            taken = self._sample(shot)
            write_atomically(file, lambda partial: torch.save(astuple(taken), partial))
        return Taken(*torch.load(file, weights_only=True))

    @torch.no_grad()
    def _sample(self, shot: Shot) -> Taken:
        model, settings, schedule = self.models[shot.model], self.settings, self.schedule(shot.model)(shot.steps)
        noise = schedule[0] * torch.randn(settings.prompts, *self.size, generator=torch.Generator().manual_seed(shot.seed))
        latents, spent, start = [], [], time.perf_counter()
        for rows in torch.arange(settings.prompts).split(settings.batch):
            draw_rows = partial(sample, conditioning=tuple(part[rows] for part in self.conditioning), noise=noise[rows], steps=shot.steps,
                                cfg=settings.cfg, uncond=self.uncond, schedule=schedule)
            with self._products():
                if not shot.method:
                    latents.append(draw_rows(model.denoise_direction))
                    spent.append(1.0)
                    continue
                method = self.contenders[shot.model][shot.method].method
                with Budgeted(model, Plan(shot.budget), method, schedule) as budgeted:
                    latents.append(draw_rows(budgeted))
                spent.append(budgeted.spent.achieved)
        seconds = (time.perf_counter() - start) / settings.prompts if settings.alone else None
        return Taken(torch.cat(latents), sum(spent) / len(spent), seconds)

    def _products(self) -> torch.autocast:
        """In which type matrix products are taken."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16)

    def floor(self, model: str, method: str, steps: int) -> float:
        """The lowest budget that a contender can spend."""
        chosen, network = self.contenders[model][method].method, self.models[model]
        geometry, costs = self._geometry(network), self._costs(network)
        tokens = geometry.image_tokens
        overhead = len(costs) * chosen.router.flops(geometry) / _dense(costs, tokens)
        family = family_of(network)
        added = family.added_costs(network, geometry, chosen.router.low_rank)
        return forecast(Plan(0.0), chosen.router, self.schedule(model)(steps)[:-1], costs, tokens, chosen.needs_history, overhead, added,
                        level=partial(family.level, network))

    def gigaflops(self, shot: Shot, spent: float) -> float:
        """Of the blocks, for one picture."""
        if shot.model == SCENES:
            return 0.0
        evaluations = shot.steps * (1 if self.settings.cfg == 1.0 else 2)
        model = self.models[shot.model]
        return spent * evaluations * _dense(self._costs(model), self._geometry(model).image_tokens) / 1e9

    def _geometry(self, model: nn.Module) -> Geometry:
        return family_of(model).geometry(model, prod(self.size[1:]) // model.config.patch_size**2, self.conditioning[0])

    def _costs(self, model: nn.Module) -> list[BlockCost]:
        return family_of(model).costs(model, self._geometry(model), BACKEND)


def _dense(costs: list[BlockCost], tokens: int) -> float:
    return sum(cost.at(tokens) for cost in costs)


@cache
def digest(path: Path) -> str:
    """What tells one file from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
