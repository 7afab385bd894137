"""A tiny Latte for the tests, driven as `toy_dit.DiTScene` drives a DiT."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from toy_dit import DiTScene

from dydit_core.families.latte import LatteFamily
from dydit_core.models.dit import timestep
from dydit_core.models.latte import Latte, LatteConfig
from dydit_core.runtime import Branches, Run, running

FAMILY = LatteFamily()
CONFIG = LatteConfig(hidden_size=32, depth=4, num_heads=4, side=12, frames=5, classes=5)
BLOCKS, TOKENS = CONFIG.depth, CONFIG.frames * CONFIG.positions


def tiny_latte(seed: int = 0, config: LatteConfig = CONFIG) -> Latte:
    """Random weights, large enough that every block matters in the output."""
    torch.manual_seed(seed)
    model = Latte(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "_embed" not in name:
            parameter.mul_(2.0)
    return model


def sees() -> list[Tensor]:
    """By block, which tokens [tokens, tokens] see one another: those of a frame, then those of a position."""
    frame, position = torch.arange(TOKENS) // CONFIG.positions, torch.arange(TOKENS) % CONFIG.positions
    return [place[:, None] == place for _ in range(BLOCKS // 2) for place in (frame, position)]


@dataclass
class LatteScene(DiTScene):
    model: nn.Module = field(default_factory=tiny_latte)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.branches = self.branches or Branches.cond_only(self.rows)
        self.grid = (CONFIG.frames, CONFIG.side // 2, CONFIG.side // 2)
        self.geometry = FAMILY.geometry(self.model, TOKENS)
        self.costs = FAMILY.costs(self.model, self.geometry, self.backend)
        self.picture = torch.randn(self.rows, 4, CONFIG.frames, CONFIG.side, CONFIG.side)
        self.noise = torch.randn_like(self.picture)
        self.labels = torch.arange(self.rows) % (CONFIG.classes + 1)

    def embed(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Tokens and condition that enter the blocks; time is added here, as `sees` and the costs do not mind."""
        x, sigmas, labels = self.inputs(sigma)
        tokens = self.model.x_embedder(x.transpose(1, 2).flatten(0, 1)) + self.model.pos_embed
        condition = self.model.embed_time(timestep(sigmas, CONFIG.prediction), x.dtype) + self.model.y_embedder(labels)
        return tokens.unflatten(0, (self.rows, -1)).flatten(1, 2) + self.model.temp_embed.repeat_interleave(CONFIG.positions, 1), condition

    def passing(self, run: Run) -> running:
        return running(run, FAMILY, self.model, self.geometry, self.branches, self.rows, self.grid, self.backend)
