"""A tiny DiT for the tests, driven as `toy.Scene` drives a FLUX; and its blocks from their equations, computed whole and then masked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from reference import Widths, masked
from torch import Tensor, nn
from torch.nn import functional as F
from toy import BACKEND, Scene

from dydit_core.blocks import Backend
from dydit_core.families.dit import DiTFamily
from dydit_core.models.dit import DiT, DiTConfig, timestep
from dydit_core.routers.dit import DiTRouters, Linears, TokenMLP
from dydit_core.runtime import Branches, Run, running

FAMILY = DiTFamily()
CONFIG = DiTConfig(hidden_size=32, depth=3, num_heads=4, side=16, classes=5, prediction="flow")
BLOCKS, HEADS, GROUPS, TOKENS = CONFIG.depth, CONFIG.num_heads, 8, CONFIG.tokens


def tiny_dit(seed: int = 0, config: DiTConfig = CONFIG) -> DiT:
    """Random weights, large enough that every block matters in the output."""
    torch.manual_seed(seed)
    model = DiT(config).requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name != "pos_embed":
            parameter.mul_(2.0)
    return model


@dataclass
class DiTScene(Scene):
    """`side` is fixed by the positions."""

    model: nn.Module = field(default_factory=tiny_dit)
    text: int = 0
    backend: Backend = BACKEND

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.branches = self.branches or Branches.cond_only(self.rows)
        self.grid = (self.side, self.side)
        self.geometry = FAMILY.geometry(self.model, self.side**2)
        self.costs = FAMILY.costs(self.model, self.geometry, self.backend)
        self.picture = torch.randn(self.rows, 4, 2 * self.side, 2 * self.side)
        self.noise = torch.randn_like(self.picture)
        self.labels = torch.arange(self.rows) % (CONFIG.classes + 1)

    def inputs(self, sigma: float) -> tuple[Tensor, Tensor, Tensor]:
        return (1 - sigma) * self.picture + sigma * self.noise, torch.full((self.rows,), sigma), self.labels

    def embed(self, sigma: float) -> tuple[Tensor, Tensor]:
        """Tokens and condition that enter the blocks."""
        x, sigmas, labels = self.inputs(sigma)
        time = timestep(sigmas, self.model.config.prediction)
        tokens = self.model.x_embedder(x) + self.model.pos_embed
        return tokens, self.model.embed_time(time, x.dtype) + self.model.y_embedder(labels)

    def blocks(self, x: Tensor, condition: Tensor) -> Tensor:
        for block in self.model.blocks:
            x = block(x, condition, transformer_options={})
        return x

    def passing(self, run: Run) -> running:
        return running(run, FAMILY, self.model, self.geometry, self.branches, self.rows, self.grid, self.backend)


def reference(model: DiT, entering: tuple[Tensor, Tensor], computed: Tensor, history: dict[int, Tensor] | None = None,
              widths: Widths | None = None, sees: Sequence[Tensor] = ()) -> Tensor:
    """As of `reference.forward`; independent of the engine. `sees` [tokens, tokens] by block: who sees whom, if not all do."""
    x, condition = entering
    for index, block in enumerate(model.blocks):
        heads, groups = (widths or {}).get(index, (None, None))
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition).unsqueeze(1).chunk(6, -1)

        def normed(x: Tensor) -> Tensor:
            return F.layer_norm(x, x.shape[-1:], eps=1e-6)

        q, k, v = (part.unflatten(-1, (block.num_heads, -1)).transpose(1, 2)
                   for part in block.attn.qkv(normed(x) * (1 + scale1) + shift1).chunk(3, -1))
        scores = (q @ k.mT) * q.shape[-1] ** -0.5
        attention = (scores.masked_fill(~sees[index], -torch.inf) if sees else scores).softmax(-1) @ v
        x = x + gate1 * block.attn.proj(masked(attention.transpose(1, 2).flatten(2), heads))
        hidden = F.gelu(block.mlp.fc1(normed(x) * (1 + scale2) + shift2), approximate="tanh")
        value, on = block.mlp.fc2(masked(hidden, groups)), computed[index][..., None]
        if history is not None:
            value = history[index] = torch.where(on, value, history.get(index, torch.zeros_like(value)))
            on = torch.ones_like(on)
        x = x + gate2 * value * on
    return x


def routers(seed: int = 0, always_on: bool = True, spread: float = 1.0, blocks: int = BLOCKS) -> DiTRouters:
    """Random official routers, about half of whose gates are on."""
    torch.manual_seed(seed)
    width, less = CONFIG.hidden_size, int(always_on)

    def linears(units: int) -> Linears:
        return Linears(torch.randn(blocks, units - less, width) * spread, torch.randn(blocks, units - less) * spread * 0.5)

    tokens = TokenMLP(torch.randn(blocks, 4, width) * width**-0.5, torch.zeros(blocks, 4), torch.randn(blocks, 4), torch.zeros(blocks))
    return DiTRouters(linears(HEADS), linears(GROUPS), tokens, HEADS, GROUPS)
