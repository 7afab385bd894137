"""The token router of the DyDiT authors' FLUX release, folded.

Their equation (DyDiT++, arXiv 2504.06803, released code): with shift and scale of image and text from one linear layer
of SiLU(condition), and a LayerNorm that image and text share,

    logit_i = w · [ LN(x_i)(1 + scale_x) + shift_x  +  mean over all text slots of (LN(t)(1 + scale_t) + shift_t) ] + w0

and a token is computed where sigmoid(logit) > 0.5. x and t are the raw residual streams: after the attention residual in
a double block, the input of a single block. The mean runs over padding too, so the number of text slots (256) is part of
the function. With γ and β of the LayerNorm, and n its output without them, this is

    logit_i = n(x_i) · u_x + mean n(t) · u_t + c,    u_x = γ w (1 + scale_x),    u_t = γ w (1 + scale_t)

where u_x, u_t and c depend on the condition alone. The linear layers (3.5 GB for FLUX.1-lite) are read once for a run
and prompt, a block at a time, folded for every sigma of the schedule, and dropped. What stays is 2W + 1 numbers for each
block, sigma and prompt, whatever the batch: 32 MB for FLUX.1-lite, 28 sigmas and one prompt. Samplers that evaluate
between two sigmas of the schedule (Heun and SDE variants) get the line between the vectors of these two; outside the
schedule, the nearest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kept import Kept
from ..parts import Allotment, Extent, Gate, Geometry, Outlook, Router, Setting
from .quantiles import Quantiles
from .shift import along_one_shift, alike

_EPS = 1e-5  # of the router's own LayerNorm; the blocks' have 1e-6


@dataclass(frozen=True)
class RouterWeights:
    """One block's router: `linear` [4·width, width] gives shift and scale of image, then of text; `vector` [1, width]."""

    linear: Tensor
    linear_bias: Tensor
    norm: Tensor
    norm_bias: Tensor
    vector: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Folded:
    """A block's router at S sigmas for P prompts: `image` and `text` [S, P, width], `offset` [S, P]."""

    image: Tensor
    text: Tensor
    offset: Tensor

    def of(self, prompts: Tensor) -> Folded:
        """For some prompts alone."""
        return Folded(self.image[:, prompts], self.text[:, prompts], self.offset[:, prompts])

    def at(self, index: int, further: float, prompts: Tensor) -> Folded:
        """For the batch rows of `prompts` [rows], at one point: `further` of the way from sigma `index` to the next."""
        def there(part: Tensor) -> Tensor:
            return (torch.lerp(part[index], part[index + 1], further) if further else part[index])[prompts]

        return Folded(there(self.image), there(self.text), there(self.offset))

    def logits(self, image: Tensor, text: Tensor) -> Tensor:
        """[rows, tokens], float32, from the residual streams [rows, tokens, width]; for one point (`at`)."""
        mean = _normed(text).mean(1)
        offset = (mean * self.text).sum(-1) + self.offset
        return torch.bmm(_normed(image), self.image[..., None])[..., 0] + offset[:, None]


def _normed(x: Tensor) -> Tensor:
    # In float32 whatever the model's type: a threshold decides, and the fold must be the function that was trained.
    return F.layer_norm(x.float(), x.shape[-1:], eps=_EPS)


def fold(weights: RouterWeights, conditions: Tensor) -> Folded:
    """The router under `conditions` [S, P, width], on their device."""
    mixed = F.silu(conditions.float())

    def here(part: Tensor) -> Tensor:
        return part.to(mixed.device).float()

    vector, norm, norm_bias = here(weights.vector)[0], here(weights.norm), here(weights.norm_bias)
    shifts, scales = [], []
    for index, (matrix, bias) in enumerate(zip(weights.linear.chunk(4), weights.linear_bias.chunk(4))):
        if index % 2 == 0:  # of a shift only its product with the vector is needed
            shifts.append(mixed @ (vector @ here(matrix)) + vector @ here(bias))
        else:
            scales.append(vector * (1 + F.linear(mixed, here(matrix), here(bias))))
    offset = sum(shifts) + (scales[0] + scales[1]) @ norm_bias + here(weights.bias)
    return Folded(norm * scales[0], norm * scales[1], offset)


@dataclass(frozen=True, eq=False)
class OfficialRouter(Router):
    """These routers at any budget: one threshold over all blocks, moved by what earlier evaluations of the run showed.

    The files have no capacity table, so the first evaluation is dense and measures. `read(block)` gives a block's
    weights from the file.
    """

    read: Callable[[int], RouterWeights]
    blocks: int
    needs_history = measures = released = True
    trained_for = "nothing"
    text_tokens = 256  # over which the mean of the text was trained

    def start(self, setting: Setting) -> OfficialState:
        return OfficialState(self, setting)

    def flops(self, geometry: Geometry) -> float:
        """Products of one block's decision for one batch row, its share of the folding included."""
        return 2.0 * geometry.width * (geometry.image_tokens + 1) + 4.0 * geometry.width**2

    def run_bytes(self, extent: Extent) -> int:
        """Folded vectors, in float32."""
        return extent.prompts * extent.sigmas * self.blocks * (2 * extent.geometry.width + 1) * 4

    def for_reuse(self) -> OfficialRouter:
        return self

    def by_threshold(self) -> ThresholdRouter:
        return ThresholdRouter(self.read, self.blocks)


@dataclass(frozen=True, eq=False)
class ThresholdRouter(OfficialRouter):
    """These routers at their own threshold: what they compute is what the authors' model computes."""

    needs_history = measures = False

    def start(self, setting: Setting) -> ThresholdState:
        return ThresholdState(self, setting)


S = TypeVar("S", bound="_FoldedState")


@dataclass(eq=False)
class _FoldedState:
    """Folded routers of one stream, under `conditions` [S, P, width]; blocks are folded when they first decide.

    `prompts` [rows]: which of the P prompts each batch row has. Pictures of one prompt share what is folded for it.
    """

    router: OfficialRouter
    setting: Setting
    conditions: Tensor | None = None
    prompts: Tensor | None = None
    folded: dict[int, Folded] = field(default_factory=dict)

    def logits(self, gate: Gate) -> Tensor:
        """[rows, image tokens], float32."""
        if gate.block not in self.folded:
            if self.conditions is None or self.prompts is None:
                self.conditions, self.prompts = self._over_schedule(gate)
            self.folded[gate.block] = fold(self.router.read(gate.block), self.conditions)
        place = _place(gate.sigma, self.setting.sigmas)
        return self.folded[gate.block].at(*place, self.prompts).logits(gate.image, gate.text)

    def _over_schedule(self, gate: Gate) -> tuple[Tensor, Tensor]:
        """The conditions at every sigma, and whose they are: in FLUX only one of their terms, the time, follows sigma."""
        if gate.condition.shape[0] == 1:
            distinct, prompts = gate.condition, torch.zeros(1, dtype=torch.long, device=gate.condition.device)
        else:
            distinct, prompts = gate.condition.unique(dim=0, return_inverse=True)
        sigmas = torch.tensor([*self.setting.sigmas, gate.sigma], device=distinct.device)
        times = self.setting.time_embedding(sigmas, distinct.dtype).float()
        return distinct.float() + (times[:-1] - times[-1])[:, None], prompts

    def rows(self: S, part: slice) -> S:
        """With the prompts of these rows alone: a host that regroups three prompts again and again would pile them up."""
        if self.conditions is None or self.prompts is None:
            return replace(self, folded={})
        used, prompts = self.prompts[part].unique(return_inverse=True)
        folded = {block: one.of(used) for block, one in self.folded.items()}
        return replace(self, conditions=self.conditions[:, used], prompts=prompts, folded=folded)

    def joined(self: S, others: Sequence[S]) -> S:
        every = [self, *others]
        if any(state.conditions is None for state in every):
            return replace(self, conditions=None, prompts=None, folded={})
        before = [sum(state.conditions.shape[1] for state in every[:index]) for index in range(len(every))]
        prompts = torch.cat([state.prompts + count for state, count in zip(every, before)])
        blocks = set.intersection(*(set(state.folded) for state in every))
        folded = {block: _join([state.folded[block] for state in every]) for block in blocks}
        return replace(self, conditions=torch.cat([state.conditions for state in every], 1), prompts=prompts, folded=folded)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        return None

    def reset(self) -> None:
        """Prompts and schedule are still the same, and so is what was folded."""


def _join(parts: Sequence[Folded]) -> Folded:
    return Folded(*(torch.cat(of_prompts, 1) for of_prompts in zip(*((one.image, one.text, one.offset) for one in parts))))


@dataclass(eq=False)
class OfficialState(_FoldedState):
    """A token's rank is its logit; capacities follow the logits' quantiles of the evaluations before."""

    measured: Quantiles | None = None
    shift: float | None = None

    def __post_init__(self) -> None:
        # A part of what was one stream goes on from what that had measured.
        self.measured = Quantiles(self.router.blocks) if self.measured is None else self.measured.copy()

    def keep(self, outlook: Outlook) -> Allotment:
        table, blocks = self.measured.table(), self.router.blocks
        if table is None and self.measured.any:
            return Allotment(torch.ones(blocks))  # under way from the device: dense once more
        if table is None:
            return alike(outlook)  # for the forecast; the first evaluation of a run is dense and measures
        allotment, self.shift = along_one_shift(outlook, table, (), self.shift)
        return allotment

    def scores(self, gate: Gate) -> Tensor:
        logits = self.logits(gate)
        self.measured.put(gate.block, logits)
        return logits


@dataclass(eq=False)
class ThresholdState(_FoldedState):
    """A token's rank is how far its probability is above one half; above 0 it is computed."""

    def keep(self, outlook: Outlook) -> Allotment:
        return Allotment(None)

    def scores(self, gate: Gate) -> Tensor:
        # In the model's type, as the authors' code rounds: in bfloat16 a logit up to 0.0078 still gives 0.5, which is off.
        return self.logits(gate).to(gate.image.dtype).sigmoid().float() - 0.5


def _place(sigma: float, schedule: Sequence[float]) -> tuple[int, float]:
    """Index of the last sigma of the falling `schedule` that is not below `sigma`, and how far `sigma` is to the next."""
    above = sum(1 for step in schedule if step >= sigma) - 1
    if above < 0:
        return 0, 0.0
    if above >= len(schedule) - 1:
        return len(schedule) - 1, 0.0
    return above, (schedule[above] - sigma) / (schedule[above] - schedule[above + 1])
