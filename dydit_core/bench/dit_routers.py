"""Routers that decide as trained ones do on average, for a model whose weights are random.

How many heads, channel groups and tokens each block computes is a table; which ones is drawn. Units lean to one side, and
further to it or to the other as the noise falls; tokens differ by what the model makes of them, so that pictures of a batch
keep different numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..budget import Plan
from ..checkpoints.dit import find_dit
from ..checkpoints.files import bad
from ..checkpoints.source import open_source
from ..models.dit import EPS
from ..routers.dit import DiTRouters, Linears, TokenMLP
from ..runtime import Method
from ..sampling import eps_sigmas, sample, sigmas
from ..standalone import Budgeted
from ..substitutes.nothing import Nothing
from .dit_subject import DiTSubject


@dataclass(frozen=True)
class Rates:
    """Fractions [blocks] of heads, channel groups and tokens that are computed on average."""

    heads: Tensor
    groups: Tensor
    tokens: Tensor

    def __str__(self) -> str:
        parts = ("heads", self.heads), ("channel groups", self.groups), ("tokens", self.tokens)
        return "kept, from the first block to the last: " + "; ".join(
            f"{name} {part.mean():.2f} ({part.min():.2f}–{part.max():.2f})" for name, part in parts)

    def stretched(self, blocks: int) -> Rates:
        """For a model of another depth."""
        return Rates(*(F.interpolate(part[None, None], blocks, mode="linear", align_corners=True)[0, 0]
                       for part in (self.heads, self.groups, self.tokens)))


def rates_of(path: Path, steps: int = 20, rows: int = 8) -> Rates:
    """What the routers of the DyDiT in `path` decide while it draws `rows` pictures or videos in `steps` steps. Raises FileError."""
    file = find_dit(open_source(path))
    routers = file.read_routers()
    if routers is None:
        raise bad(path, f"is {file}", "choose a DyDiT, whose routers can be asked")
    model = file.read_model()
    levels = eps_sigmas(steps) if file.config.prediction == EPS else sigmas(steps)
    noise = torch.randn(rows, *file.config.latent_size, generator=torch.Generator().manual_seed(0)) * levels[0]
    with Budgeted(model, Plan(0.0), Method(routers.by_threshold(), Nothing()), levels[:-1]) as budgeted:
        sample(budgeted, (torch.arange(rows) % (file.config.classes or 1),), noise, steps, schedule=levels)
    seen = budgeted.spent.evaluations
    return Rates(*(torch.tensor(np.mean([each(one) for one in seen], axis=0), dtype=torch.float32) for each in (
        lambda one: one.heads.values().mean(1), lambda one: one.groups.values().mean(1), lambda one: one.mask().mean((1, 2)))))


# With these DiT-XL/2 executes 0.49 of its blocks' FLOPs, as the authors' λ = 0.5 does (0.488). Blocks differ.
HALF = Rates(torch.tensor([0.35, 0.75]), torch.tensor([0.50, 0.90]), torch.tensor([0.88, 0.48]))


def routers_like(rates: Rates, subject: DiTSubject, schedule: list[float]) -> DiTRouters:
    """Routers with the rates of `rates` over `schedule`, in the layout of March 2025: unit 0 is always on."""
    config, here = subject.config, rates.stretched(subject.config.depth)
    generator = torch.Generator().manual_seed(0)
    embedding = subject.family.time_embedding(subject.model, subject.backend, torch.tensor(schedule), subject.dtype).float().cpu()
    heads, groups = (_units(embedding, rate, config.num_heads, generator) for rate in (here.heads, here.groups))
    tokens = _tokens(_residuals(subject, schedule[len(schedule) // 2]), here.tokens, generator)
    return DiTRouters(heads, groups, tokens, config.num_heads, config.num_heads)


def _units(embedding: Tensor, rate: Tensor, count: int, generator: torch.Generator) -> Linears:
    """`embedding` [S, width] of the schedule, `rate` [blocks]."""
    blocks = len(rate)
    # The direction along which the embedding goes evenly from the first step to the last: of itself it moves to and fro.
    onward = torch.linalg.pinv(embedding - embedding.mean(0)) @ torch.linspace(-1, 1, len(embedding))
    leaning, rising = torch.randn(2, blocks, count - 1, generator=generator)
    weight = rising[..., None] * onward
    bias = leaning - weight @ embedding.mean(0)
    logits = torch.einsum("sw,bow->bso", embedding, weight).flatten(1) + bias.repeat(1, len(embedding))
    wanted = ((rate * count - 1) / (count - 1)).clamp(0, 1)
    return Linears(weight, bias - _edges(logits, wanted)[:, None]).requires_grad_(False)


def _tokens(residuals: list[Tensor], rate: Tensor, generator: torch.Generator) -> TokenMLP:
    """`residuals`: of each block, [rows, tokens, width], what its router will see in a dense forward."""
    width = residuals[0].shape[-1]
    hidden = width // 16
    down = torch.randn(len(rate), hidden, width, generator=generator) * width**-0.5
    up = torch.randn(len(rate), hidden, generator=generator) * hidden**-0.5
    logits = torch.stack([(F.relu(x @ down[block].T) @ up[block]).flatten() for block, x in enumerate(residuals)])
    return TokenMLP(down, torch.zeros(len(rate), hidden), up, -_edges(logits, rate)).requires_grad_(False)


def _edges(logits: Tensor, rate: Tensor) -> Tensor:
    """What `rate` [blocks] of the `logits` [blocks, N] are above."""
    return torch.stack([row.quantile(1 - part) for row, part in zip(logits, rate)])


@torch.inference_mode()
def _residuals(subject: DiTSubject, sigma: float) -> list[Tensor]:
    found: list[Tensor] = []
    hooks = [block.norm2.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].float().cpu())) for block in subject.model.blocks]
    try:
        subject.prepare(sigma)()
    finally:
        for hook in hooks:
            hook.remove()
    return found
