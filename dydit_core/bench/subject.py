"""The FLUX that is measured: its shape, its inputs, and what a forward of it costs on the device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from ..backend import TorchBackend
from ..families.flux import FluxFamily
from ..models.flux import Flux, FluxConfig
from ..parts import Geometry
from ..runtime import Branches, Run, running
from .probe import defaults

ARCHITECTURES = {
    "dev": FluxConfig(guidance_embed=True),
    "lite": FluxConfig(depth=8, depth_single_blocks=38, guidance_embed=True),
    "schnell": FluxConfig(),
}


def for_cpu(config: FluxConfig) -> FluxConfig:
    """One double block, and single blocks in about the same ratio."""
    return replace(config, depth=1, depth_single_blocks=round(config.depth_single_blocks / config.depth))


class Subject:
    """A FLUX with random weights on `side`² image tokens and `text` text tokens, batch 1; its latent follows sigma."""

    def __init__(self, config: FluxConfig, side: int, text: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config, self.grid, self.device, self.dtype = config, (side, side), device, dtype
        with defaults(device, dtype):
            self.model = Flux(config).requires_grad_(False)
            latent = (1, config.in_channels, config.patch_size * side, config.patch_size * side)
            self.picture, self.noise = torch.randn(latent), torch.randn(latent)
            self.context, self.pooled = torch.randn(1, text, config.context_in_dim), torch.randn(1, config.vec_in_dim)
            self.guidance = torch.full((1,), 3.5) if config.guidance_embed else None
        self.family, self.backend = FluxFamily(), TorchBackend()
        self.geometry = Geometry(side * side, text, config.hidden_size, config.mlp_ratio)
        self.costs = self.family.costs(self.model, self.geometry, self.backend)
        self.block_flops = sum(cost.at(side * side) for cost in self.costs)

    def __str__(self) -> str:
        return (f"FLUX, width {self.config.hidden_size}, {self.config.depth} + {self.config.depth_single_blocks} blocks, "
                f"{self.geometry.image_tokens} + {self.geometry.text_tokens} tokens, {str(self.dtype)[6:]}")

    def prepare(self, sigma: float) -> Callable[[], Tensor]:
        """The model's own forward at `sigma`, its inputs ready on the device."""
        x, t = torch.lerp(self.picture, self.noise, sigma), torch.full((1,), sigma, device=self.device)
        return lambda: self.model(x, t, self.context, self.pooled, self.guidance)

    def passing(self, run: Run, family: FluxFamily) -> AbstractContextManager[None]:
        return running(run, family, self.model, self.geometry, Branches.cond_only(1), 1, self.grid, self.backend)
