"""The frozen base as training sees it: it makes the runs that are learned from, and carries the gates in its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backend import TorchBackend
from ..blocks import Backend, Family, Pass
from ..sampling import Velocity, sigmas
from ..families.flux import FluxFamily
from ..models.flux import Flux
from ..parts import BlockCost, Geometry
from ..runtime import swapped


@dataclass(frozen=True)
class Teacher:
    """`model` holds the blocks; `velocity` (see `sampling.Velocity`) runs it, with gradients where a caller asks for
    them; `schedule(steps)` gives the steps + 1 falling sigmas of a sampling run, the last one 0. `patch`: latent pixels
    on a token's side."""

    model: nn.Module
    family: Family
    backend: Backend
    velocity: Velocity
    schedule: Callable[[int], list[float]]
    patch: int = 2
    device: torch.device = torch.device("cpu")

    def gated(self, current: Pass, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """Velocity [rows, C, H, W] in float32 with `current` in the blocks."""
        with swapped(self.family.blocks(self.model), self.family, current, self.backend):
            return self.velocity(x, sigma, context, pooled).float()

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of one latent of the size of `latents` [..., H, W]."""
        return -(-latents.shape[-2] // self.patch) * -(-latents.shape[-1] // self.patch)

    def costs(self, latents: Tensor, text_tokens: int) -> list[BlockCost]:
        """FLOPs of each block for one such latent."""
        geometry = Geometry(self.tokens(latents), text_tokens, *self.family.sizes(self.model))
        return self.family.costs(self.model, geometry, self.backend)


def flux_teacher(model: Flux, guidance: float = 3.5, schedule: Callable[[int], list[float]] = sigmas,
                 products: torch.dtype = torch.bfloat16) -> Teacher:
    """A FLUX of `models.flux`; its matrix products are made in `products`. `guidance` counts where the model has an input for it."""
    device = next(model.parameters()).device

    def velocity(x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        scale = torch.full((len(x),), guidance, device=device) if model.config.guidance_embed else None
        with torch.autocast(device.type, dtype=products, enabled=products != torch.float32):
            return model(x, sigma, context, pooled, scale)

    return Teacher(model, FluxFamily(), TorchBackend(), velocity, schedule, model.config.patch_size, device)
