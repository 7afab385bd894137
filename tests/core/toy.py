"""A tiny FLUX and how the tests drive it: one evaluation, one run, and FLOPs counted around the block calls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dydit_core.backend import TorchBackend
from dydit_core.budget import Plan
from dydit_core.families.flux import FluxFamily
from dydit_core.kept import Kept
from dydit_core.memory import Rowless
from dydit_core.models.flux import Flux, FluxConfig, rotary_table
from dydit_core.parts import Allotment, Gate, Geometry, Outlook, Router, Setting, Width
from dydit_core.recorder import Recorder
from dydit_core.routers.learned import LearnedRouter
from dydit_core.routers.token import CapacityTable, TokenScores
from dydit_core.runtime import Branches, Method, Run, running
from dydit_core.trace import Evaluation

FAMILY, BACKEND = FluxFamily(), TorchBackend()
CONFIG = FluxConfig(hidden_size=32, depth=1, depth_single_blocks=3, in_channels=4, context_in_dim=12, vec_in_dim=8,
                    axes_dim=(4, 6, 6))
BLOCKS = CONFIG.depth + CONFIG.depth_single_blocks


def tiny_flux(seed: int = 0) -> Flux:
    """Random weights, large enough that every block matters in the output."""
    torch.manual_seed(seed)
    model = Flux(CONFIG).requires_grad_(False)
    for parameter in model.parameters():
        parameter.mul_(2.0)
    return model


def schedule(steps: int) -> list[float]:
    """Falling sigmas from 1, without the final zero."""
    return [1.0 - step / steps for step in range(steps)]


def heun(sigmas: Sequence[float]) -> list[float]:
    """The evaluations of Heun's method: s0, s1, s1, s2, s2, …"""
    return [sigmas[0]] + [sigma for sigma in sigmas[1:] for _ in range(2)]


@dataclass
class Scene:
    """A model and its inputs; the latent follows sigma, so that every evaluation differs."""

    model: Flux = field(default_factory=tiny_flux)
    rows: int = 1
    side: int = 8
    text: int = 5
    branches: Branches | None = None
    mask: Tensor | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        self.branches = self.branches or Branches.cond_only(self.rows)
        self.grid = (self.side, self.side)
        self.geometry = Geometry(self.side**2, self.text, CONFIG.hidden_size)
        self.costs = FAMILY.costs(self.model, self.geometry, BACKEND)
        self.picture = torch.randn(self.rows, 4, 2 * self.side, 2 * self.side)
        self.noise = torch.randn_like(self.picture)
        self.context, self.pooled = torch.randn(self.rows, self.text, 12), torch.randn(self.rows, 8)

    def inputs(self, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x = (1 - sigma) * self.picture + sigma * self.noise
        return x, torch.full((self.rows,), sigma), self.context, self.pooled

    def embed(self, sigma: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Image tokens, text tokens, condition and rotary table that enter the blocks."""
        x, t, context, pooled = self.inputs(sigma)
        img, txt, vec = self.model.img_in(self.model.patchify(x)), self.model.txt_in(context), self.model.embed_condition(t, pooled)
        positions = self.model.positions(self.text, *self.grid)
        return img, txt, vec, rotary_table(positions, CONFIG.axes_dim, CONFIG.theta)

    def blocks(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        """All blocks, called as the host calls them: [rows, text + image tokens, width]."""
        for block in self.model.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec, pe=pe, attn_mask=self.mask)
        x = torch.cat((txt, img), dim=1)
        for block in self.model.single_blocks:
            x = block(x, vec=vec, pe=pe, attn_mask=self.mask)
        return x

    def passing(self, run: Run) -> running:
        return running(run, FAMILY, self.model, self.geometry, self.branches, self.rows, self.grid, BACKEND)

    def evaluate(self, run: Run, sigma: float) -> Tensor:
        """One evaluation under `run`: the tokens after the last block."""
        run.arrive(sigma)
        entering = self.embed(sigma)
        with self.passing(run):
            return self.blocks(*entering)

    def run(self, plan: Plan, method: Method, sigmas: Sequence[float],
            evaluations: Sequence[float] | None = None) -> tuple[Run, list[Tensor], tuple[Evaluation, ...]]:
        """A whole run over the schedule `sigmas`: what each evaluation gave, and its trace."""
        recorder = Recorder()
        run = Run(plan, method, sigmas, recorder)
        outputs = [self.evaluate(run, sigma) for sigma in evaluations or sigmas]
        run.finish()
        return run, outputs, recorder.finish()


def count(work: Callable[[], object]) -> float:
    """FLOPs of `work` (the fused attention on CPU is invisible to torch's counter, so it is unfolded)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def counted_run(scene: Scene, plan: Plan, method: Method, sigmas: Sequence[float],
                evaluations: Sequence[float] | None = None) -> tuple[Run, float]:
    """A run, and the budget it really spent: FLOPs counted around the block calls ÷ the same calls dense."""
    run, spent = Run(plan, method, sigmas), []
    for sigma in evaluations or sigmas:
        run.arrive(sigma)
        entering = scene.embed(sigma)
        with scene.passing(run):
            spent.append(count(lambda: scene.blocks(*entering)))
    run.finish()
    return run, sum(spent) / len(spent) / count(lambda: scene.blocks(*entering))


def gaussian_router(sigma_bins: int = 4, seed: int = 3) -> LearnedRouter:
    """A token router whose blocks want different capacities, with the table of gaussian logits around each bias."""
    torch.manual_seed(seed)
    scores = TokenScores(BLOCKS, CONFIG.hidden_size, rank=4).requires_grad_(False)
    scores.bias.copy_(torch.linspace(-1.0, 1.0, BLOCKS))
    probabilities = torch.linspace(0, 1, 33).clamp(1e-3, 1 - 1e-3)
    quantiles = torch.special.ndtri(probabilities) + scores.bias[:, None, None]
    return LearnedRouter(scores, CapacityTable(quantiles.expand(-1, sigma_bins, -1), torch.linspace(1 / sigma_bins, 1, sigma_bins)))


class ScriptedRouter(Rowless, Router):
    """Given kept fractions [blocks] and random scores known beforehand from (block, sigma): both a Router and its State."""

    def __init__(self, keep: Sequence[float], needs_history: bool = False, widths: Sequence[Width] | None = None) -> None:
        self.widths = widths
        self.fractions, self.needs_history = torch.tensor(keep, dtype=torch.float64), needs_history

    def start(self, setting: Setting) -> ScriptedRouter:
        return self

    def keep(self, outlook: Outlook) -> Allotment:
        return Allotment(self.fractions, widths=self.widths)

    def flops(self, geometry: Geometry) -> float:
        return 0.0

    def scores(self, gate: Gate) -> Tensor:
        return scripted_scores(gate.block, gate.sigma, *gate.image.shape[:2])

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        return None


def scripted_scores(block: int, sigma: float, rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * block + round(997 * sigma))
    return torch.rand(rows, tokens, generator=generator)


def forwards(model: nn.Module) -> list[Callable | None]:
    """What stands in each block's own `__dict__` as `forward`: nothing, on an untouched model."""
    return [block.__dict__.get("forward") for block in FAMILY.blocks(model)]
