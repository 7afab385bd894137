"""Gates in training: everything is computed, and what a gate lets through is multiplied by it.

DyDiT (arXiv 2410.03456 §3.4): a gate is sigmoid((logit + logistic noise) / tau), rounded in the forward pass and left
soft in the backward pass. The blocks are run by the family code that runs at inference.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..gather import take_lines
from ..kept import Kept
from ..parts import FULL_WIDTH, BlockCost, Gate, Lines, LowRank, Weights, Width
from ..routers.sketch import Sketches, sketch
from ..routers.token import TokenScores
from ..routers.width import WidthScores
from ..td_lora import TimestepLoRA
from .told import ScoresAt, ToldScores


class Gates(nn.Module):
    """What an adapter trains: token scores (SDT), width scores (TDW), a TD-LoRA; any may be missing."""

    def __init__(self, tokens: TokenScores | ToldScores | ScoresAt | None = None, width: WidthScores | None = None,
                 low_rank: TimestepLoRA | None = None) -> None:
        super().__init__()
        self.tokens, self.width, self.low_rank = tokens, width, low_rank

    def at(self, level: int) -> Gates:
        """The gates at one of the budgets that they are told; themselves where they are not."""
        return Gates(self.tokens.at(level), self.width, self.low_rank) if isinstance(self.tokens, ToldScores) else self


@dataclass(frozen=True)
class Noise:
    """Logistic noise on the logits: tokens [blocks, rows, image tokens], heads and groups [rows, blocks, units]."""

    tokens: Tensor | None
    heads: Tensor | None = None
    groups: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """What an evaluation leaves to the next: by block the `values` [rows, image tokens, width] that stand in for skipped tokens
    (where a block has none, all its tokens are computed), and what their inputs were then."""

    values: dict[int, Tensor] = field(default_factory=dict)
    sketches: Sketches = field(default_factory=Sketches)


class TrainingPass:
    """A `blocks.Pass` that computes everything and lets gates decide what is used.

    `levels` [rows]: noise's shares (see `blocks.Family.level`); `shift` moves all logits; `noise` is added to them; None for the
    plain threshold. `past`: what stands in for skipped tokens; None for nothing. Afterwards `gates` and `logits` hold [rows, image
    tokens] by block, and `history` what the next evaluation finds.
    """

    def __init__(self, source: Gates, text_tokens: int, levels: Tensor, shift: Tensor | float = 0.0,
                 noise: Noise | None = None, tau: float = 1.0, past: Past | None = None) -> None:
        self.source, self.text_tokens, self.shift = source, text_tokens, shift
        self.noise, self.tau, self.past = noise, tau, past
        self.sigma = math.nan  # the rows of a training batch have one each
        self.logits: dict[int, Tensor] = {}
        self.gates: dict[int, Tensor] = {}
        self.history = Past()
        self.heads = self.groups = self.omega = None
        self._certain: dict[int | str, Tensor] = {}  # mean of each gate without noise: what will be run
        if source.width is not None:
            heads, groups = source.width(levels)
            self.heads = self._units("heads", heads, noise and noise.heads)
            self.groups = self._units("groups", groups, noise and noise.groups)
        if source.low_rank is not None:
            self.omega = source.low_rank.weights(levels)

    def aside(self) -> TrainingPass:
        """The same pass, for running a block again: what it writes down is apart, or it would keep the second run's graph alive."""
        other = copy.copy(self)
        other.logits, other.gates, other.history, other._certain = {}, {}, Past(), {}
        return other

    def _units(self, name: str, logits: Tensor, noise: Tensor | None) -> Tensor:
        """Gates [rows, blocks, units]; the unit with the highest logit is always on."""
        highest = torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)

        def gates(moved: Tensor) -> Tensor:
            return torch.maximum(straight_through(moved / self.tau), highest)

        self._certain[name] = gates(logits + self.shift).mean((0, 2))
        return gates(logits + self.shift if noise is None else logits + self.shift + noise)

    def select(self, gate: Gate) -> Kept | None:
        if self.source.tokens is None:
            self.gates[gate.block] = gate.image.new_ones(gate.image.shape[:2], dtype=torch.float32)
            self._remember(gate, self.gates[gate.block])
            return None
        with torch.autocast(gate.image.device.type, enabled=False):
            change = None if self.past is None else self.past.sketches.change(gate).detach()
            logits = self.source.tokens(gate.float(), change)
        moved = logits + self.shift
        if self.noise is not None:
            moved = moved + self.noise.tokens[gate.block]
        self.logits[gate.block] = logits
        self._certain[gate.block] = straight_through((logits + self.shift) / self.tau).mean()[None]
        self.gates[gate.block] = straight_through(moved / self.tau)
        self._remember(gate, self.gates[gate.block])
        return None

    def _remember(self, gate: Gate, opened: Tensor) -> None:
        if self.past is not None:
            now = sketch(gate.normed).detach()
            before = self.past.sketches.held.get(gate.block, torch.zeros_like(now))
            self.history.sketches.held[gate.block] = torch.where(opened[..., None] > 0, now, before)

    def width(self, block: int) -> Width:
        if self.heads is None:
            return FULL_WIDTH
        return Width(head_gate=self.heads[:, block], group_gate=self.groups[:, block])

    def low_rank(self, block: int, layer: str, x: Tensor) -> LowRank | None:
        low = None if self.omega is None else self.source.low_rank.at(self.omega[:, block], block, layer)
        return None if low is None else LowRank(low.down.to(x), low.up.to(x))

    def cut(self, key: Hashable, weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines) -> Weights:
        return take_lines(take_lines(weight, 0, rows), 1, columns), None if bias is None else take_lines(bias, 0, rows)

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        open_ = self.gates[block][..., None]
        if self.past is None:
            return torch.addcmul(residual, gate * open_.to(gate), values)
        before = self.past.values.get(block)
        now = values if before is None else torch.lerp(before, values, open_.to(before))
        self.history.values[block] = now
        return torch.addcmul(residual, gate, now)

    def cost(self, costs: Sequence[BlockCost]) -> Tensor:
        """Executed FLOPs of the blocks over dense ones [rows]."""
        tokens, executed = self.gates[0].shape[1], 0.0
        for block, cost in enumerate(costs):
            heads, groups = (1.0, 1.0) if self.heads is None else (part[:, block].mean(-1) for part in (self.heads, self.groups))
            executed = executed + cost.at(self.gates[block].sum(-1), heads, groups)
        return executed / sum(cost.at(tokens) for cost in costs)

    @property
    def certain(self) -> Tensor:
        """What each gate lets through in the mean, without noise, which shuts gates that nothing shuts when the model is run.
        A gate is the tokens, the heads or the channel groups of a block."""
        return torch.cat([self._certain[key] for key in sorted(self._certain, key=str)])


def straight_through(x: Tensor) -> Tensor:
    """1 where `x` > 0, else 0; its gradient is the sigmoid's."""
    soft = torch.sigmoid(x)
    return (x > 0).float() + (soft - soft.detach())
