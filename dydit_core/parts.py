"""The protocols of the engine, and what passes between them.

A method answers three questions: *who decides* (`Router`), *what* is switched (a token, an attention head or a group of
MLP channels in a block, run by a `blocks.Family`) and *what stands in* for a token that was not computed (`Substitute`). The
runtime knows these protocols and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .kept import Kept
    from .td_lora import TimestepLoRA


Weights = tuple[Tensor, Tensor | None]
# The noise's share 0 … 1 at sigmas (see `blocks.Family.level`).
Level = Callable[[Tensor], Tensor]
# Rows or columns of a weight: rising, separate runs (start, stop). One run is a view, several are a copy. Numbers and no
# tensor of indices, as those would have to travel to the device before every product.
Lines = tuple[tuple[int, int], ...]


def unchanged(sigmas: Tensor) -> Tensor:
    """The `Level` of flow-matching models, whose sigma is the noise's share itself."""
    return sigmas


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

    @property
    def hidden(self) -> int:
        """Channels inside the MLP."""
        return round(self.width * self.mlp_ratio)


@dataclass(frozen=True)
class Extent:
    """What the memory of a run depends on, beside its batch rows.

    `blocks`, sigmas in the schedule, prompts; bytes of one number of the model, and of the `weights` that widths cut.
    """

    geometry: Geometry
    blocks: int
    sigmas: int
    prompts: int
    element_size: int
    weights: int = 0


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block for one batch row, by what they are proportional to.

    `fixed` is always spent; `token` for each image token kept; `heads` and `groups` by the fraction of attention heads
    and MLP channel groups kept; `token_heads`, `token_groups` by both.
    """

    fixed: float
    token: float = 0.0
    heads: float = 0.0
    token_heads: float = 0.0
    groups: float = 0.0
    token_groups: float = 0.0

    def at(self, kept: Any, heads: Any = 1.0, groups: Any = 1.0) -> Any:
        """FLOPs for `kept` image tokens and fractions of heads and groups (numbers or tensors)."""
        return (self.fixed + kept * self.token + heads * (self.heads + kept * self.token_heads)
                + groups * (self.groups + kept * self.token_groups))

    def __add__(self, other: BlockCost) -> BlockCost:
        return BlockCost(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(self)))


@dataclass(frozen=True)
class Gate:
    """What a router may look at when block `block` asks which image tokens to compute.

    `image` [rows, image tokens, width] and `text` [rows, text tokens, width] are the residual streams; a model may have no
    text. `norm` and `norm_text` give the block's own LayerNorm (no affine) of them. `condition` [rows, width] is that of adaLN.
    """

    block: int
    sigma: float
    image: Tensor
    condition: Tensor
    norm: Callable[[], Tensor]
    text: Tensor | None = None
    norm_text: Callable[[], Tensor | None] = lambda: None

    @cached_property
    def normed(self) -> Tensor:
        """Computed when a router first looks: for one that does not, skipped tokens need no LayerNorm."""
        return self.norm()

    @cached_property
    def normed_text(self) -> Tensor | None:
        return self.norm_text()

    def float(self) -> Gate:
        """The same in float32, as training looks at it."""
        return replace(self, image=self.image.float(), norm=lambda: self.normed.float())


@dataclass(frozen=True)
class Width:
    """Attention heads and MLP channel groups that a block computes, the same for all rows; None: all of them.

    `heads`, `groups`: sorted indices on the CPU, of `head_count` and `group_count`. A pass that trains computes everything and multiplies instead, by
    `head_gate` [rows, heads] and `group_gate` [rows, groups].
    """

    heads: Tensor | None = None
    groups: Tensor | None = None
    head_count: int = 0
    group_count: int = 0
    head_gate: Tensor | None = None
    group_gate: Tensor | None = None

    @property
    def fractions(self) -> tuple[float, float]:
        """Of heads and of channel groups."""
        return (1.0 if self.heads is None else len(self.heads) / self.head_count,
                1.0 if self.groups is None else len(self.groups) / self.group_count)


FULL_WIDTH = Width()


@dataclass(frozen=True)
class LowRank:
    """An addition to a linear layer: x ↦ x downᵀ upᵀ. `down` [(rows,) rank, inputs], `up` [(rows,) outputs, rank]."""

    down: Tensor
    up: Tensor


@dataclass(frozen=True)
class Allotment:
    """What evaluations compute: fractions [..., blocks] of the image tokens, the heads and the channel groups.

    `tokens` is None where every token is computed whose score is above 0, however many those are. `widths`: which heads and
    groups, per block, where an allotment is for one evaluation and not everything is kept.
    """

    tokens: Tensor | None
    heads: Tensor | float = 1.0
    groups: Tensor | float = 1.0
    widths: Sequence[Width] | None = None


@dataclass(frozen=True)
class Outlook:
    """What a router knows when it chooses how much to compute, before the forward, on the CPU.

    `sigmas`: the evaluations still to come inside the window, this one first. `share`: mean cost they may have, as a
    fraction of dense. `done`: evaluations inside the window before this one, which cost `spent` dense ones. `min_keep`:
    least kept fraction of tokens where any are chosen; `protected`: fraction that is computed in any case, never more.
    `costs` are those of the blocks, `added` those of an adapter's additions to them. `level` as of `blocks.Family`.
    """

    sigmas: Tensor
    share: float
    done: int
    spent: float
    min_keep: float
    costs: Sequence[BlockCost]
    image_tokens: int
    added: Sequence[BlockCost] = ()
    protected: float = 0.0
    level: Level = unchanged

    @cached_property
    def levels(self) -> Tensor:
        """The noise's shares 0 … 1 at `sigmas`."""
        return self.level(self.sigmas)

    @cached_property
    def _parts(self) -> tuple[Tensor, ...]:
        """Each part [blocks] of the costs for all image tokens, as a fraction of all blocks dense."""
        dense = sum(cost.at(self.image_tokens) for cost in self.costs)
        executed = [cost + more for cost, more in zip(self.costs, self.added)] if self.added else self.costs

        def part(name: str, scale: float = 1.0) -> Tensor:
            return torch.tensor([getattr(cost, name) * scale / dense for cost in executed], dtype=torch.float64)

        return (part("fixed"), part("token", self.image_tokens), part("heads"), part("token_heads", self.image_tokens),
                part("groups"), part("token_groups", self.image_tokens))

    def cost(self, allotment: Allotment) -> Tensor:
        """Cost [...] of an allotment as a fraction of dense."""
        fixed, token, heads, token_heads, groups, token_groups = self._parts
        tokens = allotment.tokens.double()
        return (fixed + tokens * token + allotment.heads * (heads + tokens * token_heads)
                + allotment.groups * (groups + tokens * token_groups)).sum(-1)


@dataclass(frozen=True)
class Setting:
    """What a router's state may know of its run.

    `sigmas`: the schedule, falling. `time_embedding(sigmas [S], dtype)` is the model's part of the adaLN condition
    [S, width] that follows the noise level; None where no model is at hand (a forecast).
    """

    sigmas: Sequence[float]
    time_embedding: Callable[[Tensor, torch.dtype], Tensor] | None = None


class RouterState(Protocol):
    """A router's memory for one stream of branches in one run."""

    def keep(self, outlook: Outlook) -> Allotment:
        """What this evaluation computes."""
        ...

    def scores(self, gate: Gate) -> Tensor:
        """Rank [rows, image tokens] of the image tokens; the highest are computed."""
        ...

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        """Told which tokens are computed (None: all)."""
        ...

    def reset(self) -> None:
        """The sampler went back up: what was seen of the picture is worth nothing any more."""
        ...

    def rows(self, part: slice) -> RouterState:
        """The memory of these batch rows alone; the whole is not used again."""
        ...

    def joined(self, others: Sequence[RouterState]) -> RouterState:
        """The memory of these batch rows and, after them, of the others'; the single ones are not used again."""
        ...


class Router(Protocol):
    """Who decides: an immutable configuration that opens a `RouterState` per run. The defaults hold for most.

    `needs_history`: the first evaluation must compute every token. `measures`: it wants to score those of evaluations
    that compute everything, too. `low_rank`: what its adapter adds to the layers while it decides. `text_tokens`: how many it
    was trained with, where it averages over padding too.
    """

    needs_history: bool = False
    measures: bool = False
    low_rank: TimestepLoRA | None = None
    text_tokens: int | None = None

    @property
    def units(self) -> tuple[int, int] | None:
        """Heads and channel groups of each block, where it chooses among them."""
        return None

    def start(self, setting: Setting) -> RouterState: ...

    def flops(self, geometry: Geometry) -> float:
        """FLOPs of one decision for one batch row."""
        return 0.0

    def row_bytes(self, extent: Extent) -> int:
        """Bytes that a run holds for each of its batch rows."""
        return 0

    def run_bytes(self, extent: Extent) -> int:
        """Bytes that a run holds once."""
        return 0


class Trained(Router, Protocol):
    """A router that was trained: of an adapter, or of a released model, which was trained, all of it, with `released` routers.

    `trained_for`: what stood in for a skipped token in training.
    """

    released: bool
    trained_for: str

    def for_reuse(self) -> Router:
        """The same where skipped tokens reuse."""
        ...

    def by_threshold(self) -> Router | None:
        """The same at the file's own threshold, if it has one, as the authors' model computes; then the budget is ignored."""
        ...


class SubstituteState(Protocol):
    """A substitute's memory for one stream of branches in one run."""

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        """Residual [rows, image tokens, width] after the unit.

        `gate` [rows, 1, width] is the adaLN gate, `values` the unit's output for what is `kept`, as `Kept.take` gives it
        (for all rows and tokens when `kept` is None).
        """
        ...

    def reset(self) -> None:
        """As of `RouterState`."""
        ...

    def rows(self, part: slice) -> SubstituteState:
        """As of `RouterState`."""
        ...

    def joined(self, others: Sequence[SubstituteState]) -> SubstituteState:
        """As of `RouterState`."""
        ...


class Substitute(Protocol):
    """What stands in for a skipped token: an immutable configuration that opens a `SubstituteState` per run."""

    needs_history: bool

    def start(self) -> SubstituteState: ...

    def row_bytes(self, extent: Extent) -> int:
        """As of `Router`."""
        ...
