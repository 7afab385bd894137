"""The frozen base as training sees it: it makes the runs that are learned from, and carries the gates in its blocks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor, nn

from ..backend import TorchBackend
from ..blocks import Backend, Family, Pass
from ..families.flux import FluxFamily
from ..families.known import family_of
from ..models.dit import EPS, DiT
from ..models.flux import Flux
from ..models.latte import Latte
from ..parts import BlockCost, Geometry
from ..runtime import swapped
from ..sampling import Conditioning, Velocity, eps_sigmas, sigmas, unsqueezed


@dataclass(frozen=True)
class Teacher:
    """`model` holds the blocks; `velocity` (see `sampling.Velocity`) runs it, with gradients where a caller asks for
    them; `schedule(steps)` gives the steps + 1 falling sigmas of a sampling run, the last one 0. `patch`: latent pixels
    on a token's side. `eps`: a noisy latent is picture + sigma · noise, and not (1 − sigma) · picture + sigma · noise.
    `frames`: of its latents [rows, C, frames, H, W], None where they are of pictures, [rows, C, H, W]."""

    model: nn.Module
    family: Family
    backend: Backend
    velocity: Velocity
    schedule: Callable[[int], list[float]]
    patch: int = 2
    device: torch.device = torch.device("cpu")
    eps: bool = False
    frames: int | None = None

    def gated(self, current: Pass, x: Tensor, sigma: Tensor, *conditioning: Tensor) -> Tensor:
        """Velocity, like `x`, in float32 with `current` in the blocks."""
        with swapped(self.family.blocks(self.model), self.family, current, self.backend):
            return self.velocity(x, sigma, *conditioning).float()

    def level(self, sigma: Tensor) -> Tensor:
        """The noise levels `sigma` [rows] as shares of noise in the mixture, 0…1, whatever the model counts them by."""
        return self.family.level(self.model, sigma)

    def mixed(self, x: Tensor, sigma: Tensor) -> Tensor:
        """`x` [rows, …] at `sigma` [rows] as such a mixture, so that lengths at different noise levels compare."""
        return x / unsqueezed(1 + sigma, x) if self.eps else x

    def tokens(self, latents: Tensor) -> int:
        """Image tokens of one latent of the size of `latents` [..., H, W]."""
        height, width = latents.shape[-2:]
        return (self.frames or 1) * ceil(height / self.patch) * ceil(width / self.patch)

    def geometry(self, latents: Tensor, conditioning: Conditioning) -> Geometry:
        return self.family.geometry(self.model, self.tokens(latents), conditioning[0])

    def costs(self, latents: Tensor, conditioning: Conditioning) -> list[BlockCost]:
        """FLOPs of each block for one such latent."""
        return self.family.costs(self.model, self.geometry(latents, conditioning), self.backend)


def flux_teacher(model: Flux, guidance: float = 3.5, schedule: Callable[[int], list[float]] = sigmas,
                 products: torch.dtype = torch.bfloat16) -> Teacher:
    """A FLUX of `models.flux`; its matrix products are made in `products`. `guidance` counts where the model has an input for it."""
    device = next(model.parameters()).device

    def velocity(x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        scale = torch.full((len(x),), guidance, device=device) if model.config.guidance_embed else None
        with torch.autocast(device.type, dtype=products, enabled=products != torch.float32):
            return model(x, sigma, context, pooled, scale)

    return Teacher(model, FluxFamily(), TorchBackend(), velocity, schedule, model.config.patch_size, device)


def dit_teacher(model: DiT | Latte, products: torch.dtype = torch.bfloat16) -> Teacher:
    """A DiT or SiT of `models.dit`, or a Latte of `models.latte`; its matrix products are made in `products`."""
    device, eps = next(model.parameters()).device, model.config.prediction == EPS

    def velocity(x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=products, enabled=products != torch.float32):
            return model.denoise_direction(x, sigma, labels)

    frames = model.config.frames if isinstance(model, Latte) else None
    return Teacher(model, family_of(model), TorchBackend(), velocity, eps_sigmas if eps else sigmas, model.config.patch_size, device, eps, frames)
