"""Where the quality tables' pictures are drawn: the demo model and its few-step twin, held-out prompts, fixed noise.

Dense pictures are kept in a folder, as latents: every row of a table is held to them, in every process.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict, astuple, dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..budget import Plan, forecast
from ..demo.base import load_base
from ..demo.codec import CHANNELS
from ..demo.data import LATENT, draw
from ..demo.files import BASE_FILE, TWIN_FILE, VAE_FILE, WEIGHTS
from ..demo.heldout import held_out, held_out_prompts
from ..demo.prompt import encode_batch
from ..demo.vae import decode, load_decoder
from ..families.flux import FluxFamily
from ..lora import load_lora, merge
from ..models.flux import Flux
from ..parts import BlockCost, Geometry
from ..sampling import sample, sigmas
from ..standalone import BACKEND, Budgeted
from ..storage import write_atomically
from .contenders import SHIPPED, SHIPPED_TWIN, Contender, contenders, shipped

NOISE_SEED, OTHER_SEED = 11, 12
BASE, TWIN = "base", "twin"
SCENES = "scenes"  # no model: the scenes of the prompts, drawn as training pictures are


@dataclass(frozen=True)
class Settings:
    """What a lab is set up with, in any process.

    `folder`: what need not be made twice. `adapters`: files by the names of their rows, those of `twin_adapters` for the twin
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


@dataclass(frozen=True)
class Shot:
    """One picture of every prompt. `model`: BASE, TWIN or SCENES; `method`: a contender, "" for dense; `seed` of the noise."""

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
    """Latents [prompts, 16, 32, 32], the budget they spent, and seconds for one of them where nothing ran beside."""

    latents: Tensor
    spent: float
    seconds: float | None


class Lab:
    """`models` and what runs on each, by BASE and (where its file is there) TWIN."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        # On CPUs without AMX the fused attention takes longer than plain matrix products in bfloat16.
        torch.backends.cuda.enable_flash_sdp(False)
        torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
        weights = settings.weights
        self.decoder = load_decoder(weights / VAE_FILE).to(memory_format=torch.channels_last)
        self.scenes = held_out(settings.prompts)
        self.context, self.pooled = encode_batch(held_out_prompts(settings.prompts))
        self.uncond = encode_batch([""])
        self.models = {BASE: load_base(weights / BASE_FILE)}
        if (weights / TWIN_FILE).exists():
            self.models[TWIN] = load_base(weights / BASE_FILE)
            merge(self.models[TWIN], load_lora(weights / TWIN_FILE))
        files = shipped(weights, SHIPPED) | dict(settings.adapters)
        more: dict[str, Mapping[str, Path]] = {BASE: {}, TWIN: {**shipped(weights, SHIPPED_TWIN), **settings.twin_adapters}}
        with self._products():
            self.contenders: dict[str, dict[str, Contender]] = {
                name: contenders(model, files | dict(more[name])) for name, model in self.models.items()}

    def key(self, shot: Shot) -> dict[str, Any]:
        """Everything that decides the pictures of `shot`, but our own code."""
        settings, files = self.settings, [VAE_FILE]
        files += {BASE: [BASE_FILE], TWIN: [BASE_FILE, TWIN_FILE], SCENES: []}[shot.model]
        paths = [settings.weights / file for file in files]
        if shot.method and (adapter := self.contenders[shot.model][shot.method].file):
            paths.append(adapter)
        return {**asdict(shot), "prompts": settings.prompts, "cfg": settings.cfg, "bfloat16": settings.bfloat16,
                "batch": settings.batch, "files": [digest(path) for path in paths]}

    def pictures(self, shot: Shot) -> tuple[Tensor, float, float | None]:
        """Images [prompts, 3, 256, 256], the budget they spent, seconds of sampling for one of them."""
        if shot.model == SCENES:
            return draw(self.scenes), 0.0, None
        taken = self.take(shot)
        latents = taken.latents.contiguous(memory_format=torch.channels_last)
        return decode(latents, self.decoder).contiguous(), taken.spent, taken.seconds

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
        model, settings = self.models[shot.model], self.settings
        noise = torch.randn(settings.prompts, CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(shot.seed))
        latents, spent, start = [], [], time.perf_counter()
        for rows in torch.arange(settings.prompts).split(settings.batch):
            draw_rows = partial(sample, conditioning=(self.context[rows], self.pooled[rows]), noise=noise[rows], steps=shot.steps,
                                cfg=settings.cfg, uncond=self.uncond)
            with self._products():
                if not shot.method:
                    latents.append(draw_rows(model))
                    spent.append(1.0)
                    continue
                method = self.contenders[shot.model][shot.method].method
                with Budgeted(model, Plan(shot.budget), method, sigmas(shot.steps)) as budgeted:
                    latents.append(draw_rows(budgeted))
                spent.append(budgeted.spent.achieved)
        seconds = (time.perf_counter() - start) / settings.prompts if settings.alone else None
        return Taken(torch.cat(latents), sum(spent) / len(spent), seconds)

    def _products(self) -> torch.autocast:
        """In which type matrix products are taken."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.settings.bfloat16)

    def floor(self, model: str, method: str, steps: int) -> float:
        """The lowest budget that a contender can spend."""
        chosen, flux = self.contenders[model][method].method, self.models[model]
        costs, tokens = self._costs(flux), self._geometry.image_tokens
        overhead = len(costs) * chosen.router.flops(self._geometry) / _dense(costs, tokens)
        added = FluxFamily().added_costs(flux, self._geometry, chosen.router.low_rank)
        return forecast(Plan(0.0), chosen.router, sigmas(steps)[:-1], costs, tokens, chosen.needs_history, overhead, added)

    def gigaflops(self, shot: Shot, spent: float) -> float:
        """Of the blocks, for one picture."""
        if shot.model == SCENES:
            return 0.0
        evaluations = shot.steps * (1 if self.settings.cfg == 1.0 else 2)
        return spent * evaluations * _dense(self._costs(self.models[shot.model]), self._geometry.image_tokens) / 1e9

    @property
    def _geometry(self) -> Geometry:
        config = self.models[BASE].config
        return Geometry((LATENT // config.patch_size) ** 2, self.context.shape[1], config.hidden_size, config.mlp_ratio)

    def _costs(self, model: Flux) -> list[BlockCost]:
        return FluxFamily().costs(model, self._geometry, BACKEND)


def _dense(costs: list[BlockCost], tokens: int) -> float:
    return sum(cost.at(tokens) for cost in costs)


@cache
def digest(path: Path) -> str:
    """What tells one file from another."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
