"""How much each block changes the picture's tokens, measured on dense runs: what layer skip goes by.

One minus the cosine between a token before and after what would be skipped (ShortGPT, arXiv 2403.03853, calls it block
influence): the image MLP of a double block, the whole update of a single one.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from ..budget import Plan
from ..demo.codec import CHANNELS
from ..demo.data import LATENT, training_scene
from ..demo.prompt import encode_batch
from ..memory import Rowless
from ..models.flux import Flux
from ..kept import Kept
from ..parts import Extent
from ..routers.learned import LearnedRouter
from ..runtime import Method
from ..sampling import sample, sigmas
from ..standalone import Budgeted

PROMPTS, STEPS = 4, 4


@dataclass(eq=False)
class Watching(Rowless):
    """Stands in for nothing, since everything is computed: notes the change of each block. A `Substitute` and its state."""

    needs_history = False
    seen: dict[int, list[float]] = field(default_factory=dict)

    def start(self) -> Watching:
        return self

    def row_bytes(self, extent: Extent) -> int:
        return 0

    def update(self, block: int, residual: Tensor, gate: Tensor, kept: Kept | None, values: Tensor) -> Tensor:
        after = torch.addcmul(residual, gate, values)
        self.seen.setdefault(block, []).append(1.0 - float(F.cosine_similarity(residual.float(), after.float(), dim=-1).mean()))
        return after


def influence(model: Flux) -> list[float]:
    """Of each block, mean over training prompts and the noise levels of a short run."""
    context, pooled = encode_batch([training_scene(index)[1][0] for index in range(PROMPTS)])
    noise = torch.randn(PROMPTS, CHANNELS, LATENT, LATENT, generator=torch.Generator().manual_seed(0))
    watching = Watching()
    with Budgeted(model, Plan(1.0), Method(LearnedRouter(), watching), sigmas(STEPS)) as dense:
        sample(dense, (context, pooled), noise, STEPS)
    return [sum(changes) / len(changes) for _, changes in sorted(watching.seen.items())]


def least_first(model: Flux) -> tuple[int, ...]:
    """All blocks, the one with the least influence first."""
    found = influence(model)
    return tuple(sorted(range(len(found)), key=found.__getitem__))
