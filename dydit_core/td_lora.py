"""Timestep-dynamic LoRA (TD-LoRA, DyDiT++, arXiv 2504.06803): low-rank additions whose weights follow the noise level.

    W₀x + Σₙ ωₙ(t) Bₙ A x      (or the other way round: one B, several A; the shapes say which side is shared)

A re-implementation: the authors released neither code nor weights. ω is a function of the noise level alone, so it is
kept as logits at evenly spaced noise levels with straight lines between them, one set per block, under a softmax, a sigmoid
or nothing. The addition is never merged into the base: it runs beside its layer, on the tokens and channels that are
computed, so an artist's own LoRA stays what it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from .parts import LowRank

GateKind = Literal["softmax", "sigmoid", "none"]
Key = tuple[int, str]
_Home = tuple[torch.device, torch.dtype]


class TimestepLoRA(nn.Module):
    """`down` [experts or 1, rank, inputs] and `up` [experts or 1, outputs, rank] per (block, layer name);
    `mix` [knots, blocks, experts] are the logits of ω; knots are evenly spaced on noise level 0 … 1."""

    def __init__(self, factors: Mapping[Key, tuple[Tensor, Tensor]], mix: Tensor, gate: GateKind = "softmax") -> None:
        super().__init__()
        self.keys, self.gate = list(factors), gate
        self.mix = nn.Parameter(mix)
        self.down = nn.ParameterList([down for down, _ in factors.values()])
        self.up = nn.ParameterList([up for _, up in factors.values()])
        self._place = {key: place for place, key in enumerate(self.keys)}

    @property
    def ranks(self) -> dict[Key, int]:
        return {key: down.shape[1] for key, down in zip(self.keys, self.down)}

    def weights(self, levels: Tensor) -> Tensor:
        """ω [S, blocks, experts] at the noise's shares `levels` [S] (see `blocks.Family.level`)."""
        logits = between(self.mix, levels)
        if self.gate == "softmax":
            return logits.softmax(-1)
        return logits.sigmoid() if self.gate == "sigmoid" else logits

    def at(self, omega: Tensor, block: int, layer: str) -> LowRank | None:
        """The addition mixed by `omega` [S, experts]: down [S or 1, rank, inputs], up [S or 1, outputs, rank]."""
        place = self._place.get((block, layer))
        return None if place is None else LowRank(_mixed(self.down[place], omega), _mixed(self.up[place], omega))

    def copy_to(self, device: torch.device, dtype: torch.dtype) -> TimestepLoRA:
        """An adapter's own factors stay where they are: another run may use them elsewhere."""
        factors = {key: (down.to(device, dtype), up.to(device, dtype)) for key, down, up in zip(self.keys, self.down, self.up)}
        return TimestepLoRA(factors, self.mix.to(device), self.gate).requires_grad_(False)

    def start(self) -> Mixture:
        return Mixture(self)


def new_low_rank(sizes: Mapping[Key, tuple[int, int]], blocks: int, rank: int, experts: int, knots: int = 9) -> TimestepLoRA:
    """Untrained, one A shared by `experts` B for layers of `sizes` (inputs, outputs); adds nothing yet.

    The experts start spread over the noise levels, else they would all learn the same.
    """
    factors = {key: (torch.randn(1, rank, inputs) * inputs**-0.5, torch.zeros(experts, outputs, rank))
               for key, (inputs, outputs) in sizes.items()}
    distance = torch.linspace(0, 1, knots)[:, None] - torch.linspace(0, 1, experts)[None]
    return TimestepLoRA(factors, (-4.0 * distance.abs())[:, None].repeat(1, blocks, 1))


def between(knots: Tensor, levels: Tensor) -> Tensor:
    """Values [S, …] at `levels` [S] on straight lines between `knots` [knots, …], evenly spaced on 0 … 1."""
    place = levels.to(knots).clamp(0.0, 1.0) * (len(knots) - 1)
    low = place.floor().long().clamp(max=max(0, len(knots) - 2))
    high = (low + 1).clamp(max=len(knots) - 1)
    return torch.lerp(knots[low], knots[high], (place - low).view(-1, *[1] * (knots.ndim - 1)))


def _mixed(factor: Tensor, omega: Tensor) -> Tensor:
    return factor if len(factor) == 1 else torch.tensordot(omega.to(factor.dtype), factor, dims=1)


class Mixture:
    """The additions at the noise level of the present evaluation; for one run.

    Factors go once to where they are needed; there they are mixed, and nothing has to travel for an evaluation.
    """

    def __init__(self, source: TimestepLoRA) -> None:
        self.source = source
        self._level = float("nan")
        self._placed: dict[_Home, TimestepLoRA] = {}
        self._omega: dict[_Home, Tensor] = {}
        self._mixed: dict[tuple[int, str, _Home], LowRank | None] = {}

    @torch.no_grad()
    def at(self, level: float, block: int, layer: str, x: Tensor) -> LowRank | None:
        """See `blocks.Pass.low_rank`."""
        if level != self._level:
            self._level, self._omega, self._mixed = level, {}, {}
        home = x.device, x.dtype
        key = block, layer, home
        if key not in self._mixed:
            placed, omega = self._at(home)
            low = placed.at(omega[:, block], block, layer)
            self._mixed[key] = low and LowRank(low.down[0], low.up[0])
        return self._mixed[key]

    def _at(self, home: _Home) -> tuple[TimestepLoRA, Tensor]:
        """The factors there, and ω [1, blocks, experts] at the present level."""
        if home not in self._placed:
            self._placed[home] = self.source.copy_to(*home)
        if home not in self._omega:
            self._omega[home] = self._placed[home].weights(torch.full((1,), self._level, device=home[0]))
        return self._placed[home], self._omega[home]
