"""Token scores that are told the budget: what one threshold for all budgets is compared with.

    logits at budget number l = scores with weight + weight_l, slope + slope_l, bias + bias_l
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parts import Gate
from ..routers.token import TokenScores

_TOLD = ("weight", "slope", "bias")


class ToldScores(nn.Module):
    """`shared` by all budgets, and for each of `levels` budgets what is added to its parameters [levels, …]."""

    def __init__(self, shared: TokenScores, levels: int) -> None:
        super().__init__()
        self.shared = shared
        self.added = nn.ParameterDict({name: torch.zeros(levels, *shared.get_parameter(name).shape) for name in _TOLD})

    @property
    def blocks(self) -> int:
        return self.shared.blocks

    def at(self, level: int) -> ScoresAt:
        return ScoresAt(self.shared, {name: self.shared.get_parameter(name) + self.added[name][level] for name in _TOLD})


class ScoresAt:
    """`ToldScores` at one budget: called as `TokenScores`, and `alone` as one."""

    def __init__(self, shared: TokenScores, told: dict[str, Tensor]) -> None:
        self.shared, self.told, self.blocks = shared, told, shared.blocks

    def __call__(self, gate: Gate, change: Tensor | None = None) -> Tensor:
        return torch.func.functional_call(self.shared, self.told, (gate, change))

    def alone(self) -> TokenScores:
        blocks, rank, width = self.shared.down.shape
        scores = TokenScores(blocks, width, rank, stale=self.shared.stale is not None, text=self.shared.text is not None)
        scores.load_state_dict({**self.shared.state_dict(), **self.told})
        return scores.requires_grad_(False)
