"""The protocols of the engine, and what passes between them.

A method answers three questions: *who decides* (`Router`), *what* is switched (a token in a block, run by a `Family`)
and *what stands in* for what was not computed (`Substitute`). The runtime knows these protocols and nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Geometry:
    """Sizes one forward runs at. `image_tokens` includes reference-image tokens; text is never skipped."""

    image_tokens: int
    text_tokens: int
    width: int
    mlp_ratio: float = 4.0

    @property
    def tokens(self) -> int:
        return self.image_tokens + self.text_tokens


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block for one batch row: `fixed` always, `per_token` for each image token kept."""

    fixed: float
    per_token: float

    def at(self, kept: float) -> float:
        return self.fixed + kept * self.per_token


@dataclass(frozen=True)
class Gate:
    """What a router may look at when block `block` asks which image tokens to compute.

    `normed` [rows, image tokens, width] is the block's own LayerNorm (no affine) of the image tokens, `normed_text`
    [rows, text tokens, width] that of the text, `condition` [rows, width] the adaLN condition.
    """

    block: int
    sigma: float
    normed: Tensor
    normed_text: Tensor
    condition: Tensor


@dataclass(frozen=True)
class Kept:
    """Image tokens that are computed: per branch a slice of batch rows and their sorted token indices [rows, k]."""

    parts: tuple[tuple[slice, Tensor], ...]


@dataclass(frozen=True)
class Outlook:
    """What a router knows when it chooses how many tokens to compute, before the forward, on the CPU.

    `sigmas`: the evaluations still to come inside the window, this one first. `share`: mean cost they may have, as a
    fraction of dense. `done`: evaluations inside the window before this one, which cost `spent` dense ones. `min_keep`:
    least kept fraction.
    """

    sigmas: Tensor
    share: float
    done: int
    spent: float
    min_keep: float
    costs: Sequence[BlockCost]
    image_tokens: int

    @cached_property
    def _shares(self) -> tuple[float, Tensor]:
        """Fixed share of dense, and the share [blocks] of each block's image tokens."""
        fixed = sum(cost.fixed for cost in self.costs)
        token = torch.tensor([cost.per_token * self.image_tokens for cost in self.costs], dtype=torch.float64)
        dense = fixed + float(token.sum())
        return fixed / dense, token / dense

    def cost(self, keep: Tensor) -> Tensor:
        """Cost of kept fractions [..., blocks] as a fraction of dense [...]."""
        fixed, token = self._shares
        return fixed + keep.double() @ token


class RouterState(Protocol):
    """A router's memory for one stream of branches in one run."""

    def scores(self, gate: Gate) -> Tensor:
        """Rank [rows, image tokens] of the image tokens; the highest are computed."""
        ...

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        """Told which tokens are computed (None: all)."""
        ...

    def reset(self) -> None:
        """Forget everything; the next evaluation is as the first."""
        ...


class Router(Protocol):
    """Who decides: an immutable configuration that opens a `RouterState` per run."""

    needs_history: bool

    def keep(self, outlook: Outlook) -> Tensor:
        """Kept fraction [blocks] of this evaluation's image tokens."""
        ...

    def start(self) -> RouterState: ...

    def flops(self, geometry: Geometry) -> float:
        """FLOPs of one decision for one batch row."""
        ...


class SubstituteState(Protocol):
    """A substitute's memory for one stream of branches in one run."""

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Sequence[Tensor]) -> Tensor:
        """Residual [rows, image tokens, width] after the unit.

        `gate` [rows, 1, width] is the adaLN gate, `values` the unit's output [rows, k, width] for each part of
        `kept` (for all rows and tokens when `kept` is None).
        """
        ...

    def reset(self) -> None: ...


class Substitute(Protocol):
    """What stands in for a skipped token: an immutable configuration that opens a `SubstituteState` per run."""

    needs_history: bool

    def start(self) -> SubstituteState: ...

    def history_bytes(self, geometry: Geometry, blocks: int, rows: int, element_size: int) -> int:
        """Bytes held for a whole run."""
        ...


class Backend(Protocol):
    """How a host computes what a family needs besides calling the block's own submodules."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict | None) -> Tensor:
        """[rows, query tokens, width] from q, k, v [rows, heads, tokens, head width]; counts of q and k may differ."""
        ...

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Rotary embedding of x [rows, heads, tokens, head width]."""
        ...

    def weights(self, linear: nn.Module, x: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor | None]]:
        """Effective weight and bias (LoRA applied, on x's device, in its dtype) while the context is open."""
        ...

    def unsliceable(self, linear: nn.Module) -> str | None:
        """Why rows of this layer's weight cannot be used alone, or None."""
        ...


class Pass(Protocol):
    """One forward of the model under a plan, as a family sees it."""

    def select(self, block: int, normed: Tensor, normed_text: Tensor, condition: Tensor) -> Kept | None:
        """Image tokens to compute in this block; None means all of them."""
        ...

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Sequence[Tensor]) -> Tensor:
        """Residual after the unit, with the substitute in place of what was skipped."""
        ...


class Family(Protocol):
    """How the blocks of one model architecture run in parts."""

    name: str

    def refusal(self, model: nn.Module) -> str | None:
        """Why this model is not of the family, or None."""
        ...

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The gated blocks in the order they run."""
        ...

    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        """FLOPs per block and batch row."""
        ...

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        """What `block.forward(*args, **kwargs)` gives when `current` says what to compute."""
        ...
