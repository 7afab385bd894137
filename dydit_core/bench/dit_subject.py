"""The DiT or Latte that is measured: its shape, its inputs, and what a forward of it costs on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from ..backend import TorchBackend
from ..blocks import Family
from ..families.known import family_of
from ..models.dit import DiT, DiTConfig
from ..models.latte import Latte, network
from ..runtime import Branches, Run, running
from .probe import defaults


class DiTSubject:
    """A DiT or Latte with random weights on `rows` latents of as many classes; they follow sigma."""

    def __init__(self, config: DiTConfig, rows: int, device: torch.device, dtype: torch.dtype, model: DiT | Latte | None = None) -> None:
        torch.manual_seed(0)
        self.config, self.rows, self.device, self.dtype = config, rows, device, dtype
        self.grid = (*config.latent_size[1:-2], *2 * (config.side // config.patch_size,))
        with defaults(device, dtype):
            self.model = network(config).requires_grad_(False) if model is None else model
            self.picture, self.noise = torch.randn(2, rows, *config.latent_size)
            self.labels = torch.arange(rows) % (config.classes or 1)
        self.family, self.backend = family_of(self.model), TorchBackend()
        self.geometry = self.family.geometry(self.model, config.tokens)
        self.costs = self.family.costs(self.model, self.geometry, self.backend)
        self.block_flops = rows * sum(cost.at(config.tokens) for cost in self.costs)

    def prepare(self, sigma: float) -> Callable[[], Tensor]:
        """The model's own forward at `sigma`, its inputs ready on the device."""
        x, sigmas = self.picture + sigma * self.noise, torch.full((self.rows,), sigma, device=self.device)
        return lambda: self.model.denoise_direction(x, sigmas, self.labels)

    def passing(self, run: Run, family: Family) -> AbstractContextManager[None]:
        return running(run, family, self.model, self.geometry, Branches.cond_only(self.rows), self.rows, self.grid, self.backend)
