"""Who runs in the speed benchmark: the methods with synthetic routers, and a lane for each at each budget."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..budget import Plan
from ..layouts import LIMIT_BYTES
from ..recorder import Recorder
from ..routers.change import ChangeRouter
from ..routers.learned import LearnedRouter
from ..routers.token import CapacityTable, TokenScores
from ..routers.width import WidthScores
from ..runtime import Method, Run
from ..substitutes.history import Reuse
from ..substitutes.nothing import Nothing
from ..td_lora import TimestepLoRA, new_low_rank
from .subject import Subject
from .timing import Lane

NAMES = {
    "tokens": "learned tokens, nothing",
    "widths": "learned widths, nothing",
    "both": "learned tokens and widths, nothing",
    "low-rank": "tokens, widths and low-rank additions, nothing",
    "changed": "changed tokens, reuse",
}


def methods(subject: Subject) -> dict[str, Method]:
    """Learned routers with synthetic weights, whose blocks and units want different capacities, and the training-free method.

    The latter with every evaluation alike (`early=0`), so that the evaluations measured stand for the run.
    """
    blocks = len(subject.costs)
    scores, table, added = token_scores(subject), capacities(blocks), low_rank(subject)
    width = synthetic_widths(blocks, subject.config.num_heads)
    return {
        "tokens": Method(LearnedRouter(scores, table), Nothing()),
        "widths": Method(LearnedRouter(width=width), Nothing()),
        "both": Method(LearnedRouter(scores, table, width), Nothing()),
        "low-rank": Method(LearnedRouter(scores, table, width, low_rank=added), Nothing()),
        "changed": Method(ChangeRouter(early=0.0), Reuse()),
    }


def token_scores(subject: Subject) -> TokenScores:
    with subject.device:
        return TokenScores(len(subject.costs), subject.config.hidden_size).requires_grad_(False)


def capacities(blocks: int) -> CapacityTable:
    probabilities = torch.linspace(0, 1, 65).clamp(1e-4, 1 - 1e-4)
    wants = torch.linspace(-0.5, 0.5, blocks)[:, None, None]
    quantiles = (torch.special.ndtri(probabilities) + wants).expand(-1, 8, -1)
    return CapacityTable(quantiles, torch.linspace(1 / 8, 1, 8))


def synthetic_widths(blocks: int, units: int) -> WidthScores:
    """As many groups as heads. Each has a leaning of its own, and one that grows or falls with the noise level."""
    rising = torch.linspace(-1, 1, 9)[:, None, None]
    return WidthScores(*(torch.randn(1, blocks, units) + rising * torch.randn(1, blocks, units) for _ in range(2))).requires_grad_(False)


def low_rank(subject: Subject, rank: int = 16, experts: int = 4) -> TimestepLoRA:
    """On every layer; small, so that the residual stream stays as it is."""
    sizes = {(index, name): (layer.in_features, layer.out_features)
             for index, block in enumerate(subject.family.blocks(subject.model))
             for name, layer in subject.family.layers(block).items()}
    with subject.device:
        added = new_low_rank(sizes, len(subject.costs), rank, experts).requires_grad_(False)
    for up in added.up:
        up.normal_(0, 1e-3)
    return added


def open_lanes(subject: Subject, chosen: Sequence[str], budgets: Sequence[float], sigmas: Sequence[float],
               all_blocks: int) -> list[Lane]:
    """`all_blocks`: those of the whole model, of which the subject may be a part: it holds its part of the cut weights."""
    known = methods(subject)
    lanes = [Lane("dense")] + [Lane(NAMES[name], budget, Run(Plan(budget), known[name], sigmas, Recorder()))
                               for name in chosen for budget in budgets]
    for lane in lanes[1:]:
        lane.run.layouts.limit = LIMIT_BYTES * len(subject.costs) // all_blocks
    return lanes
