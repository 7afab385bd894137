"""Latte: class-conditional and unconditional video, of DiT's blocks by turns over the positions of a frame and over time.

Submodules carry the names of the authors' files (Vchitect/Latte), so those load as they are. Equations: Latte (arXiv
2401.03048), variant 1: blocks 0, 2, … attend within each frame, blocks 1, 3, … within each position over all frames.
Here tokens stay in one order, frame after frame, and an attention regroups them for itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .dit import (FLOW, Attention, DiT, DiTBlock, DiTConfig, FinalLayer, LabelEmbedder, PatchEmbed, TimestepEmbedder, direction, grid_positions,
                  plain_attention, sines)


@dataclass(frozen=True)
class LatteConfig(DiTConfig):
    """Shape of a Latte. `side`: latent rows and columns of a frame; `classes`: 0 in an unconditional one. Those published predict noise (EPS)."""

    classes: int = 0
    frames: int = 16

    @property
    def name(self) -> str:
        return "FlowLatte" if self.prediction == FLOW else "Latte"

    @property
    def positions(self) -> int:
        """Tokens of one frame."""
        return (self.side // self.patch_size) ** 2

    @property
    def tokens(self) -> int:
        """Of a video."""
        return self.frames * self.positions

    @property
    def latent_size(self) -> tuple[int, ...]:
        """(channels, frames, rows, columns)."""
        return self.in_channels, self.frames, self.side, self.side


class SpatialBlock(DiTBlock):
    """Tokens see those of their frame."""

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, options: dict | None) -> Tensor:
        rows, positions = len(q), self.config.positions

        def by_frame(x: Tensor) -> Tensor:
            """[rows, heads, frames · positions, d] to [rows · frames, heads, positions, d]."""
            return x.unflatten(2, (-1, positions)).transpose(1, 2).flatten(0, 1)

        return attention(by_frame(q), by_frame(k), by_frame(v), None, options).unflatten(0, (rows, -1)).flatten(1, 2)


class TemporalBlock(DiTBlock):
    """Tokens see those of their position."""

    def attend(self, attention: Attention, q: Tensor, k: Tensor, v: Tensor, options: dict | None) -> Tensor:
        rows, positions = len(q), self.config.positions

        def by_position(x: Tensor) -> Tensor:
            """[rows, heads, frames · positions, d] to [rows · positions, heads, frames, d]."""
            return x.unflatten(2, (-1, positions)).permute(0, 3, 1, 2, 4).flatten(0, 1)

        out = attention(by_position(q), by_position(k), by_position(v), None, options)
        return out.unflatten(0, (rows, positions)).transpose(1, 2).flatten(1, 2)


class Latte(nn.Module):
    """The network: [rows, out channels, frames, height, width] of a noisy video latent [rows, in channels, frames, height, width].

    `operations`, `made` (dtype, device) and `attention` are the host's.
    """

    def __init__(self, config: LatteConfig, operations: Any = nn, attention: Attention = plain_attention, **made: Any) -> None:
        super().__init__()
        self.config, self.patch_size = config, config.patch_size
        width = config.hidden_size
        self.x_embedder = PatchEmbed(config, operations, **made)
        self.t_embedder = TimestepEmbedder(width, operations, **made)
        if config.classes:
            self.y_embedder = LabelEmbedder(config.classes, width, operations, **made)
        positions, times = grid_positions(width, config.side // config.patch_size), sines(torch.arange(config.frames), width)
        self.pos_embed = nn.Parameter(positions[None].to(**made), requires_grad=False)
        self.temp_embed = nn.Parameter(times.float()[None].to(**made), requires_grad=False)
        kinds = (SpatialBlock, TemporalBlock)
        self.blocks = nn.ModuleList(kinds[index % 2](config, attention, operations, **made) for index in range(config.depth))
        self.final_layer = FinalLayer(config, operations, **made)

    def embed_time(self, time: Tensor, dtype: torch.dtype) -> Tensor:
        """The part [rows, width] of the condition that follows the noise level; TDW decides by it alone."""
        return self.t_embedder(time, dtype)

    def refusal(self, shape: torch.Size) -> str | None:
        """Why a latent of this shape cannot be taken, or None."""
        made, side = self.config.frames, self.config.side
        remedy = f"use the latent of DyDiT Empty Video, {made} frames of {8 * side}×{8 * side}"
        if len(shape) != 5 or shape[2] == 1 != made:
            return f"This {self.config.title} draws videos, and the latent is of a picture; {remedy}."
        if shape[1] != self.config.in_channels:
            return f"This {self.config.title} draws in {self.config.in_channels} channels, and the latent has {shape[1]}; {remedy}."
        if shape[2] != made:
            return (f"This {self.config.title} was made for {made} frames, and the latent has {shape[2]}; {remedy}, no prompt for a part of "
                    "the video, and no Context Windows.")
        if tuple(shape[-2:]) != (side, side):
            return (f"This {self.config.title} was made for frames of {8 * side}×{8 * side}, and the latent is of {8 * shape[-1]}×{8 * shape[-2]}; "
                    f"{remedy}, and no prompt for an area.")
        return None

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
        """`time` [rows] as of `dit.timestep`; `labels` [rows] of int64, `config.classes` for no class; raises ValueError where
        the latent is of another size than the positions were made for."""
        reason = self.refusal(x.shape)
        if reason is not None:
            raise ValueError(reason)
        rows, frames, patch, side = len(x), self.config.frames, self.patch_size, self.config.side // self.patch_size
        tokens = self.x_embedder(x.transpose(1, 2).flatten(0, 1))
        tokens = (tokens + self.pos_embed.to(tokens)).unflatten(0, (rows, frames)).flatten(1, 2)
        condition = self.embed_time(time, x.dtype)
        if self.config.classes:
            condition = condition + self.y_embedder(labels).to(x.dtype)
        for index, block in enumerate(self.blocks):
            if index == 1:  # the paper adds time between the first two blocks
                tokens = tokens + self.temp_embed.to(tokens).repeat_interleave(side**2, dim=1)
            tokens = block(tokens, condition, transformer_options=transformer_options)
        out = self.final_layer(tokens, condition).unflatten(1, (frames, side, side)).unflatten(4, (patch, patch, -1))
        return out.permute(0, 6, 1, 2, 4, 3, 5).flatten(5).flatten(3, 4)

    def denoise_direction(self, x: Tensor, sigma: Tensor, labels: Tensor | None = None, transformer_options: dict | None = None) -> Tensor:
        """See `dit.direction`."""
        return direction(self, x, sigma, labels, transformer_options)


def network(config: DiTConfig, **made: Any) -> DiT | Latte:
    """The DiT, SiT or Latte of this shape."""
    return Latte(config, **made) if isinstance(config, LatteConfig) else DiT(config, **made)
