"""The sampler of the DiT paper, for parity: ancestral steps whose variance the network has learned.

DDPM (arXiv 2006.11239, eq. 7 and 11) on a part of the 1000 timesteps; the variance half of the output places each
log variance between those of the posterior and of the forward process (arXiv 2102.09672, eq. 15 and §4).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from .models.dit import STEPS, eps_log_sigmas

# [rows, 2 · channels, height, width] from x [rows, channels, height, width], timesteps [rows] and labels [rows].
Network = Callable[[Tensor, Tensor, Tensor], Tensor]


def spaced(steps: int) -> list[int]:
    """`steps` of the timesteps 0 … 999, rising, evenly spaced and rounded; the first and the last are among them."""
    if not 2 <= steps <= STEPS:
        raise ValueError(f"DDPM sampling takes 2 to {STEPS} steps, not {steps}.")
    stride = (STEPS - 1) / (steps - 1)
    return [round(stride * step) for step in range(steps)]


@dataclass(frozen=True)
class Chain:
    """The diffusion restricted to some timesteps, all in float64: `kept` is ᾱ and `kept_before` that of the step before, `beta` [steps]."""

    timesteps: tuple[int, ...]
    kept: Tensor
    kept_before: Tensor
    beta: Tensor

    @cached_property
    def posterior(self) -> Tensor:
        """Log variance [steps] of the step back where the picture is known."""
        variance = self.beta * (1 - self.kept_before) / (1 - self.kept)
        # At the first timestep it has none, and no logarithm: the next one's stands for it.
        return torch.cat((variance[1:2], variance[1:])).log()

    def step(self, x: Tensor, output: Tensor, index: int, noise: Tensor) -> Tensor:
        """x at the timestep before number `index`, from the network's `output` [rows, 2 · channels, height, width] for `x`."""
        eps, place = output.chunk(2, dim=1)
        kept, before, beta = (float(values[index]) for values in (self.kept, self.kept_before, self.beta))
        picture = x / kept**0.5 - eps * (1 / kept - 1) ** 0.5
        mean = picture * (before**0.5 * beta / (1 - kept)) + x * ((1 - beta) ** 0.5 * (1 - before) / (1 - kept))
        return mean if index == 0 else mean + (self.log_variance(place, index) / 2).exp() * noise

    def log_variance(self, place: Tensor, index: int) -> Tensor:
        """Where `place`, −1 … 1 in training, lies between the log variances of the posterior and of the forward process."""
        least, most = float(self.posterior[index]), float(self.beta[index].log())
        share = (place + 1) / 2
        return share * most + (1 - share) * least


@lru_cache(maxsize=2)
def chain(steps: int = 250) -> Chain:
    timesteps = spaced(steps)
    kept = torch.sigmoid(-2 * eps_log_sigmas())[timesteps]
    before = torch.cat((kept.new_ones(1), kept[:-1]))
    return Chain(tuple(timesteps), kept, before, 1 - kept / before)


def guided(cond: Tensor, uncond: Tensor, scale: float, channels: int = 3) -> Tensor:
    """Classifier-free guidance on the first `channels` of a network's output; the rest, the variance half too, is cond's.

    The DiT code guides three of the four latent channels and says that it does so to reproduce its own numbers.
    """
    free, given = uncond[:, :channels], cond[:, :channels]
    return torch.cat((free + scale * (given - free), cond[:, channels:]), dim=1)


@torch.no_grad()
def sample(network: Network, noise: Tensor, labels: Tensor, null: int, steps: int = 250, scale: float = 4.0, channels: int = 3,
           generator: torch.Generator | None = None) -> Tensor:
    """Latents like `noise` [rows, channels, height, width] of the classes `labels` [rows].

    `null`: the label of no class. `generator` draws the noise of the steps; it must be on the device of `noise`.
    """
    x, along = noise, chain(steps)
    both = torch.cat((labels, torch.full_like(labels, null))) if scale != 1.0 else labels
    for index, time in reversed(tuple(enumerate(along.timesteps))):
        times = torch.full((len(both),), float(time), device=x.device)
        output = network(x if scale == 1.0 else torch.cat((x, x)), times, both).float()
        if scale != 1.0:
            output = guided(*output.chunk(2), scale, channels)
        x = along.step(x, output, index, torch.randn(x.shape, generator=generator, device=x.device))
    return x
