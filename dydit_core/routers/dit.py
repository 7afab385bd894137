"""The routers in the DyDiT authors' class-conditional files: of tokens (SDT) and of widths (TDW).

DyDiT (arXiv 2410.03456 §3, released code). In each block, with x_i a token's residual after the attention, as it is, and
E_t the output of the timestep embedder, without the class,

    token   logit_i = up · ReLU(down x_i + down_bias) + up_bias         the MLP of the token is computed where logit_i > 0
    width   logits = W E_t + b, one set for heads and one for groups    a head or a channel group is computed where its logit > 0

In the files of March 2025 the widths have one output less than there are units, and unit 0 is always on. In those of
December 2024 all units are decided; where all were off, the highest stays on here. Widths follow the noise level alone:
they are decided once for a whole schedule.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..kept import Kept
from ..layouts import LIMIT_BYTES
from ..parts import Allotment, Extent, Gate, Geometry, Outlook, Router, Setting
from .quantiles import Quantiles
from .shift import along_one_shift, alike
from .token import CapacityTable
from .width import kept, widths


class Linears(nn.Module):
    """A linear layer of each block on the timestep embedding: `weight` [blocks, outputs, width], `bias` [blocks, outputs], float32."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight), nn.Parameter(bias)

    def forward(self, embedding: Tensor, units: int) -> Tensor:
        """Logits [S, blocks, units] at `embedding` [S, width]; infinite for units that no output decides, which come first."""
        logits = torch.einsum("sw,bow->sbo", embedding, self.weight) + self.bias
        return F.pad(logits, (units - logits.shape[-1], 0), value=torch.inf)


class TokenMLP(nn.Module):
    """Two linear layers of each block on its tokens, float32.

    `down` [blocks, hidden, width], `down_bias` [blocks, hidden], `up` [blocks, hidden], `up_bias` [blocks].
    """

    def __init__(self, down: Tensor, down_bias: Tensor, up: Tensor, up_bias: Tensor) -> None:
        super().__init__()
        self.down, self.down_bias = nn.Parameter(down), nn.Parameter(down_bias)
        self.up, self.up_bias = nn.Parameter(up), nn.Parameter(up_bias)

    @property
    def blocks(self) -> int:
        return len(self.down)

    def flops(self, image_tokens: int) -> float:
        """Products of one block's decision for one batch row."""
        hidden, width = self.down.shape[1:]
        return 2.0 * image_tokens * hidden * (width + 1)

    def placed(self, like: Tensor) -> TokenMLP:
        """A copy for tokens like these: the large product in their type, the sum that decides in float32."""
        large = (part.detach().to(like) for part in (self.down, self.down_bias))
        return TokenMLP(*large, *(part.detach().to(like.device) for part in (self.up, self.up_bias))).requires_grad_(False)

    def forward(self, gate: Gate, change: Tensor | None = None) -> Tensor:
        """Logits [rows, tokens], float32; how much a token changed does not count."""
        block = gate.block
        hidden = F.relu(F.linear(gate.image, self.down[block], self.down_bias[block]))
        return hidden.float() @ self.up[block] + self.up_bias[block]


@dataclass(frozen=True, eq=False)
class DiTRouters(Router):
    """A file's routers, at any budget by one shift of all their logits, or at the file's own threshold (`thresholded`).

    What is None is computed in full. `table`: calibrated quantiles of the token logits. Without one they are measured as the
    run goes, and its first evaluation is dense.
    """

    heads: Linears | None
    groups: Linears | None
    tokens: TokenMLP | None
    head_count: int
    group_count: int
    table: CapacityTable | None = None
    thresholded: bool = False
    released = True
    trained_for = "nothing"

    @property
    def needs_history(self) -> bool:
        return self.measures

    @property
    def measures(self) -> bool:
        return self.tokens is not None and self.table is None and not self.thresholded

    @property
    def units(self) -> tuple[int, int] | None:
        return None if self.heads is None and self.groups is None else (self.head_count, self.group_count)

    def unit_logits(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Of heads and of channel groups [S, blocks, units], at the timestep embedding [S, width]."""
        blocks = next(len(part.bias) for part in (self.heads, self.groups) if part is not None)
        parts = (self.heads, self.head_count), (self.groups, self.group_count)
        heads, groups = (embedding.new_full((len(embedding), blocks, units), torch.inf) if linears is None else linears(embedding, units)
                         for linears, units in parts)
        return heads, groups

    def start(self, setting: Setting) -> DiTState:
        return DiTState(self, setting)

    def flops(self, geometry: Geometry) -> float:
        """Of the tokens; widths are decided once for a run, whatever its batch."""
        return self.tokens.flops(geometry.image_tokens) if self.tokens is not None else 0.0

    def run_bytes(self, extent: Extent) -> int:
        """The token routers where the model runs, and weights that are cut for the widths."""
        mlp, copied = self.tokens, 0
        if mlp is not None:
            copied = (mlp.down.numel() + mlp.down_bias.numel()) * extent.element_size + mlp.up.nbytes + mlp.up_bias.nbytes
        return copied + (min(extent.weights, LIMIT_BYTES) if self.units is not None else 0)

    def for_reuse(self) -> DiTRouters:
        return self

    def by_threshold(self) -> DiTRouters:
        return replace(self, thresholded=True)


@dataclass(eq=False)
class DiTState:
    """`known`: logits of heads and groups [blocks, units] by sigma. `measured`: quantiles of the token logits so far."""

    router: DiTRouters
    setting: Setting
    measured: Quantiles | None = None
    known: dict[float, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _placed: TokenMLP | None = None
    _shift: float | None = None

    def __post_init__(self) -> None:
        if self.router.measures and self.measured is None:
            self.measured = Quantiles(self.router.tokens.blocks)

    def keep(self, outlook: Outlook) -> Allotment:
        router = self.router
        if router.thresholded:
            chosen = [kept(logits[0], 0.0) for logits in self._units(outlook.sigmas[:1])]
            return Allotment(None, widths=widths(*chosen) if chosen else None)
        table = router.table if self.measured is None else self.measured.table()
        if router.measures and table is None and self.measured.any:
            return Allotment(torch.ones(len(outlook.costs)))  # under way from the device: dense once more
        if (router.measures and table is None) or (router.units and self.setting.time_embedding is None):
            return alike(outlook, router.units, router.tokens is not None)
        allotment, self._shift = along_one_shift(outlook, table, self._units(outlook.sigmas), self._shift)
        return allotment

    @torch.no_grad()
    def _units(self, sigmas: Tensor) -> tuple[Tensor, ...]:
        """Logits [S, blocks, units] of heads and of groups, on the CPU; those of the whole schedule are computed at once."""
        if self.router.units is None or self.setting.time_embedding is None:
            return ()
        # Where a sampler evaluates between two steps, the forecast of it wavers in the last digits.
        wanted = [round(sigma, 7) for sigma in (*sigmas.tolist(), *self.setting.sigmas)]
        new = [sigma for sigma in dict.fromkeys(wanted) if sigma not in self.known]
        if new:
            embedding = self.setting.time_embedding(torch.tensor(new), torch.float32).float().cpu()
            self.known |= dict(zip(new, zip(*self.router.unit_logits(embedding))))
        return tuple(torch.stack(parts) for parts in zip(*(self.known[sigma] for sigma in wanted[:len(sigmas)])))

    def scores(self, gate: Gate) -> Tensor:
        if self.router.tokens is None:
            return gate.image.new_ones(gate.image.shape[:2])
        if self._placed is None or (self._placed.down.device, self._placed.down.dtype) != (gate.image.device, gate.image.dtype):
            self._placed = self.router.tokens.placed(gate.image)
        logits = self._placed(gate)
        if self.measured is not None:
            self.measured.put(gate.block, logits)
        return logits

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        return None

    def rows(self, part: slice) -> DiTState:
        """Each part goes on from what the whole had measured."""
        return replace(self, measured=self.measured and self.measured.copy())

    def joined(self, others: Sequence[DiTState]) -> DiTState:
        return self

    def reset(self) -> None:
        """Widths follow the schedule, and what was measured is the best that is known."""
