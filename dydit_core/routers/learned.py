"""Learned routers of an adapter: tokens (SDT), widths (TDW) or both, under one shift for the whole file.

Every gate has a logit. The budget moves them all by the same shift, so cheap and dear gates, tokens and widths compete
on one scale, as they did in training. Widths follow the noise level alone: they are exact beforehand. Tokens follow
the picture: how many pass is read from the file's calibrated table (block × sigma bin).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from ..kept import Kept
from ..layouts import LIMIT_BYTES
from ..parts import Allotment, Extent, Gate, Geometry, Outlook, Router, Setting
from ..td_lora import TimestepLoRA
from . import sketch
from .shift import along_one_shift
from .sketch import Sketches
from .token import CapacityTable, TokenScores
from .width import WidthScores

_EARLY_LOGITS = 3.5


@dataclass(frozen=True, eq=False)
class LearnedRouter(Router):
    """`scores` and `table` for tokens, `width` for heads and channel groups; what is None is computed in full.

    `trained_for`: what stood in for a skipped token in training. `early`: how much higher the tokens' logits are for pure noise than
    for a finished picture. Widths keep theirs: a head that is left out has no older value to fall back on.
    """

    scores: TokenScores | None = None
    table: CapacityTable | None = None
    width: WidthScores | None = None
    early: float = 0.0
    low_rank: TimestepLoRA | None = None
    trained_for: str = "nothing"
    released = False

    def for_reuse(self) -> LearnedRouter:
        """The same router where skipped tokens reuse. One that was not trained for it spends early, as errors are carried on.

        On an earlier state of the demo at 0.75 of the FLOPs, 8 steps, PSNR to the dense picture rose from 37.8 to 41.3 dB.
        """
        return self if self.trained_for == "reuse" else replace(self, early=_EARLY_LOGITS)

    def by_threshold(self) -> None:
        """Its threshold is the budget's."""

    @property
    def stale(self) -> bool:
        """How much a token changed since it was computed counts."""
        return self.scores is not None and self.scores.stale is not None

    @property
    def open(self) -> LearnedRouter:
        """Every gate open: what the low-rank additions do by themselves."""
        return replace(self, scores=None, table=None, width=None)

    @property
    def units(self) -> tuple[int, int] | None:
        return None if self.width is None else (self.width.heads.shape[-1], self.width.groups.shape[-1])

    def start(self, setting: Setting) -> LearnedState:
        return LearnedState(self)

    def flops(self, geometry: Geometry) -> float:
        return self.scores.flops(geometry.image_tokens) if self.scores is not None else 0.0

    def row_bytes(self, extent: Extent) -> int:
        return sketch.row_bytes(extent) if self.stale else 0

    def run_bytes(self, extent: Extent) -> int:
        """Copies of the adapter's parts on the model's device, and weights that are cut for the widths."""
        scores = sum(param.nbytes for param in self.scores.parameters()) if self.scores is not None else 0
        added = sum(param.numel() for param in self.low_rank.parameters()) if self.low_rank is not None else 0
        cuts = min(extent.weights, LIMIT_BYTES) if self.width is not None else 0
        return scores + added * extent.element_size + cuts


class LearnedState:
    """`sketches`: of what each token was when it was computed, where that counts."""

    def __init__(self, config: LearnedRouter, sketches: Sketches | None = None) -> None:
        self.config = config
        self.sketches = sketches if sketches is not None else Sketches() if config.stale else None
        self._placed: TokenScores | None = None
        self._shift: float | None = None

    def keep(self, outlook: Outlook) -> Allotment:
        config = self.config
        units = config.width(outlook.levels.float()) if config.width is not None else ()
        allotment, self._shift = along_one_shift(outlook, config.table, units, self._shift, config.early)
        return allotment

    def scores(self, gate: Gate) -> Tensor:
        if self._placed is None or self._placed.weight.device != gate.image.device:
            self._placed = self.config.scores.copy_to(gate.image.device)
        change = self.sketches.change(gate) if self.sketches is not None else None
        return self._placed(gate, change)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        if self.sketches is not None:
            self.sketches.computed(gate, kept)

    def reset(self) -> None:
        if self.sketches is not None:
            self.sketches.clear()

    def rows(self, part: slice) -> LearnedState:
        return self if self.sketches is None else LearnedState(self.config, self.sketches.rows(part))

    def joined(self, others: Sequence[LearnedState]) -> LearnedState:
        return self if self.sketches is None else LearnedState(self.config, self.sketches.joined([one.sketches for one in others]))
