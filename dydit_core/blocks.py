"""The protocols of running a block in parts: what a family asks of a forward under a plan, and of the host.

A `Family` restates the blocks of an architecture; a `Backend` computes what it needs besides the blocks' own layers; a
`Pass` is one forward under a plan, and says what to compute.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .parts import BlockCost, Gate, Geometry, Lines, LowRank, Weights, Width

if TYPE_CHECKING:
    from .kept import Kept
    from .td_lora import TimestepLoRA


@dataclass(frozen=True)
class Effective:
    """A layer's weight and bias as they count now, and how `x` is multiplied by rows and columns of them."""

    weight: Tensor
    bias: Tensor | None
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = nn.functional.linear


class Backend(Protocol):
    """How a host computes what a family needs besides calling the block's own submodules."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict | None) -> Tensor:
        """[rows, query tokens, width] from q, k, v [rows, heads, tokens, head width]; counts of q and k may differ."""
        ...

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        """Rotary embedding of x [rows, heads, tokens, head width]."""
        ...

    def weights(self, linear: nn.Module, x: Tensor) -> AbstractContextManager[Effective]:
        """The layer as it works on `x` (LoRA applied, on x's device, in a dtype `product` takes) while the context is open."""
        ...

    def device(self, linear: nn.Module) -> torch.device:
        """Where the layer's products are made, which need not be where its weights lie."""
        ...

    def unsliceable(self, linear: nn.Module) -> str | None:
        """Why rows of this layer's weight cannot be used alone, or None."""
        ...


class Pass(Protocol):
    """One forward of the model under a plan, as a family sees it."""

    text_tokens: int
    sigma: float

    def select(self, gate: Gate) -> Kept | None:
        """Image tokens to compute in block `gate.block`; None means all of them."""
        ...

    def width(self, block: int) -> Width:
        """Heads and channel groups to compute in this block."""
        ...

    def low_rank(self, block: int, layer: str, x: Tensor) -> LowRank | None:
        """What is added to the block's linear layer of this name, on the device and in the type of `x`, or None."""
        ...

    def cut(self, key: Hashable, weight: Tensor, bias: Tensor | None, rows: Lines, columns: Lines) -> Weights:
        """A layer's weight at these rows (outputs) and columns (inputs), and its bias at these rows.

        `key` names the block, the layer and the part of its outputs. Good until the next cut.
        """
        ...

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        """Residual after the unit, with the substitute in place of what was skipped."""
        ...


class Family(Protocol):
    """How the blocks of one model architecture run in parts."""

    name: str
    # The attribute of the model that holds its blocks, or the first of them.
    stack: str

    def refusal(self, model: nn.Module) -> str | None:
        """Why this model is not of the family, or None."""
        ...

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The gated blocks in the order they run."""
        ...

    def names(self, model: nn.Module) -> list[str]:
        """What the map calls the blocks, in the same order."""
        ...

    def sizes(self, model: nn.Module) -> tuple[int, float]:
        """Width and MLP ratio, as of `Geometry`."""
        ...

    def geometry(self, model: nn.Module, image_tokens: int, context: Tensor | None = None) -> Geometry:
        """Sizes of one forward. `context` [rows, tokens, …]: the text that the model is given, if its blocks run on any."""
        ...

    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        """FLOPs per block and batch row."""
        ...

    def added_costs(self, model: nn.Module, geometry: Geometry, low_rank: TimestepLoRA | None) -> list[BlockCost]:
        """FLOPs per block and batch row of what an adapter adds to the layers; empty where it adds nothing."""
        ...

    def level(self, model: nn.Module, sigmas: Tensor) -> Tensor:
        """The noise's share 0 … 1 of what the model is given at `sigmas`, whatever it counts them by: gates follow that."""
        ...

    def time_embedding(self, model: nn.Module, backend: Backend, sigmas: Tensor, dtype: torch.dtype) -> Tensor:
        """The part [S, width] of the adaLN condition that follows the noise level, at `sigmas` [S], computed in `dtype`."""
        ...

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        """What `block.forward(*args, **kwargs)` gives when `current` says what to compute."""
        ...
