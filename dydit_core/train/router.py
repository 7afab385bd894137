"""Trains the gates of an adapter (SDT, TDW) and its TD-LoRA for a frozen base, with the family code that runs at inference.

DyDiT (arXiv 2410.03456 §3.3–3.4, released train.py): noisy hard gates (see `gates`), and (mean cost − budget)² holds the
FLOPs. Three things differ. The base is frozen and is its own teacher: the loss is the velocity's distance to the dense
one, on the dense model's trajectories, weighted by what is left of it in the finished picture.
The router serves every budget: each step trains one of `budgets` under a shift of all logits that is learnt with it
and thrown away at the end, since the calibrated table of the adapter takes its place. And the distance enters as a
logarithm (in decibels, up to a factor), so that 0.9, where errors are small, counts as much as 0.5.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..backend import TorchBackend
from ..families.flux import FluxFamily
from ..models.flux import Flux
from ..parts import BlockCost, Geometry
from ..routers.token import TokenScores
from ..routers.width import new_width_scores
from ..runtime import swapped
from ..storage import write_atomically
from ..td_lora import new_low_rank
from .base import create_state
from .gates import Gates, Noise, TrainingPass
from .team import Team
from .trajectories import Samples, Trajectories

# Rows that a member of a team takes at a time; they share a budget and are spread over all noise levels.
GROUP = 8
# A shift moves one number where the scores move a vector, and is used by one step in as many as there are budgets.
SHIFT_PACE = 5
LOW_RANK_PACE = 0.25
# Above this shift every gate is open.
OPEN = 1e4
# At budgets up to the first, no gate of a block may let through more than the second: a head of a wide block is so useful,
# and every head of that block then so alike, that none would ever be the one to go.
MOVING_BUDGET, MOVING_SHARE = 0.5, 0.95

Log = Callable[[str], None]


@dataclass(frozen=True)
class Recipe:
    """`batch`: a multiple of GROUP. `noise`: scale of the logistic noise at the start; it falls to `last_noise`, so that
    what was trained is what the threshold does. `stale`: skipped tokens get the values of the evaluation before
    (substitute reuse) instead of nothing. What is trained: token scores where `tokens`, widths of every head and of
    `groups` channel groups (0: no widths), a TD-LoRA of `experts` (0: none) and `rank`. A budget of 1 opens every gate:
    it holds the low-rank additions to the base."""

    steps: int
    batch: int = 32
    rate: float = 6e-3
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    tau: float = 1.0
    noise: float = 0.5
    last_noise: float = 0.1
    flops_weight: float = 50.0
    stale: bool = False
    tokens: bool = True
    groups: int = 0
    experts: int = 0
    rank: int = 4


@dataclass
class RouterRun:
    """Everything a checkpoint holds. `shifts` [budgets] moves all logits at each budget of the recipe; `gauge`
    [budgets, 2] is a running mean of its cost and its error in dB."""

    gates: Gates
    shifts: nn.Parameter
    optimizer: torch.optim.Optimizer
    gauge: Tensor
    seed: int = 0
    step: int = 0

    @property
    def params(self) -> list[Tensor]:
        return [*self.gates.parameters(), self.shifts]


def carried(sigma: Tensor) -> Tensor:
    """How far an error of the velocity at `sigma` is found in the finished picture: early ones grow, late ones do not.

    A fit to what the demo base does when tokens are skipped in one of ten steps: 4.0 at sigma 1, 2.5 at 0.85, 1.2 at
    0.6, 0.7 at 0.4.
    """
    return 0.6 + 3.2 * sigma**3


def routed(model: Flux, current: TrainingPass, samples: Samples) -> Tensor:
    """Velocity of `samples` with the gates of `current` in the blocks."""
    family = FluxFamily()
    with swapped(family.blocks(model), family, current, TorchBackend()):
        return model(samples.x, samples.sigma, samples.context, samples.pooled)


def block_costs(model: Flux, data: Samples | Trajectories) -> list[BlockCost]:
    config = model.config
    geometry = Geometry(_tokens(model, data), data.context.shape[-2], config.hidden_size, config.mlp_ratio)
    return FluxFamily().costs(model, geometry, TorchBackend())


def _tokens(model: Flux, data: Samples | Trajectories) -> int:
    """Image tokens of a latent."""
    return data.x.shape[-2] * data.x.shape[-1] // model.config.patch_size**2


def new_gates(model: Flux, recipe: Recipe, rank: int) -> Gates:
    """Untrained: logits around 0, so that every gate is undecided; the low-rank additions add nothing."""
    blocks, config = len(FluxFamily().blocks(model)), model.config
    tokens = TokenScores(blocks, config.hidden_size, rank, bias=0.0) if recipe.tokens else None
    width = new_width_scores(blocks, config.num_heads, recipe.groups) if recipe.groups else None
    if not recipe.experts:
        return Gates(tokens, width)
    sizes = {(index, name): (layer.in_features, layer.out_features) for index, block in enumerate(FluxFamily().blocks(model))
             for name, layer in FluxFamily().layers(block).items()}
    return Gates(tokens, width, new_low_rank(sizes, blocks, recipe.rank, recipe.experts))


def new_router_run(model: Flux, data: Trajectories, recipe: Recipe, rank: int = 16, seed: int = 0) -> RouterRun:
    """Logits start around 0; a shift starts where the noise alone keeps the fraction that its budget means."""
    torch.manual_seed(seed)
    gates = new_gates(model, recipe, rank)
    costs, tokens = block_costs(model, data), _tokens(model, data)
    closed = (0.0 if recipe.tokens else tokens), *((0.0, 0.0) if recipe.groups else (1.0, 1.0))
    floor = sum(cost.at(*closed) for cost in costs) / sum(cost.at(tokens) for cost in costs)
    kept = [min(max((budget - floor) / (1 - floor), 0.02), 0.98) for budget in recipe.budgets]
    shifts = nn.Parameter(recipe.noise * torch.tensor(kept).logit())
    scores = [param for part in (gates.tokens, gates.width) if part is not None for param in part.parameters()]
    added = list(gates.low_rank.parameters()) if gates.low_rank is not None else []
    groups = [{"params": params, "pace": pace} for params, pace in ((scores, 1.0), (added, LOW_RANK_PACE), ([shifts], SHIFT_PACE)) if params]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98))
    create_state(optimizer)
    return RouterRun(gates, shifts, optimizer, torch.zeros(len(recipe.budgets), 2), seed)


def share(run: RouterRun) -> None:
    """Move everything that a team works on into shared memory."""
    run.gauge.share_memory_()
    for param in run.params:
        param.data.share_memory_()
        for value in run.optimizer.state[param].values():
            value.share_memory_()


def train_router(run: RouterRun, model: Flux, data: Trajectories, recipe: Recipe, checkpoint: Path, log: Log = print,
                 save_every: int = 100, team: Team = Team()) -> None:
    """Take the steps of `recipe` that `run` has not taken yet, saving to `checkpoint` on the way and at the end."""
    clock = time.monotonic()
    while run.step < recipe.steps:
        train_step(run, model, data, recipe, team)
        if not team.leads:
            continue
        if run.step % 25 == 0 or run.step == recipe.steps:
            seconds, clock = time.monotonic() - clock, time.monotonic()
            log(f"step {run.step} {_summary(run, recipe)} {seconds:.0f} s")
        if run.step % save_every == 0:
            save(run, checkpoint)
    if team.leads:
        save(run, checkpoint)


def train_step(run: RouterRun, model: Flux, data: Trajectories, recipe: Recipe, team: Team = Team()) -> float:
    """One optimizer step; returns its loss. The groups of a batch train one budget each."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
    progress = run.step / recipe.steps
    samples = data.draw(recipe.batch, generator)
    noise = _noise(run.gates, recipe, progress, (recipe.batch, _tokens(model, data)), generator)
    groups, loss = recipe.batch // GROUP, 0.0
    for rows in team.portions(recipe.batch, GROUP):
        for start in range(rows.start, rows.stop, GROUP):
            level = (run.step + start // GROUP * len(recipe.budgets) // groups) % len(recipe.budgets)
            some = slice(start, start + GROUP)
            part = _loss(run, model, recipe, level, *(part.rows(some) for part in samples), noise.rows(some)) / groups
            part.backward()
            loss += part.item()
    loss = team.exchange(run.params, loss)
    _update(run, recipe, progress, team)
    return loss


def _noise(gates: Gates, recipe: Recipe, progress: float, shape: tuple[int, int], generator: torch.Generator) -> Noise:
    """For `shape` rows and image tokens."""
    scale = recipe.noise + (recipe.last_noise - recipe.noise) * progress

    def logistic(*sizes: int) -> Tensor:
        return scale * torch.logit(torch.rand(sizes, generator=generator).clamp(1e-6, 1 - 1e-6))

    tokens = logistic(gates.tokens.blocks, *shape) if gates.tokens is not None else None
    if gates.width is None:
        return Noise(tokens)
    return Noise(tokens, *(logistic(shape[0], *part.shape[1:]) for part in (gates.width.heads, gates.width.groups)))


def _loss(run: RouterRun, model: Flux, recipe: Recipe, level: int, now: Samples, before: Samples, noise: Noise) -> Tensor:
    """Logarithm of the carried error, the distance from the budget number `level`, and gates that stay open."""
    budget = recipe.budgets[level]
    shift = run.shifts[level] if budget < 1.0 else OPEN
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stale = _values(model, before) if recipe.stale else None
        current = TrainingPass(run.gates, now.context.shape[1], now.sigma, shift, noise, recipe.tau, stale)
        velocity = routed(model, current, now)
    weight = carried(now.sigma)[:, None, None, None].square()
    error = (weight * (velocity.float() - now.velocity).square()).mean() / (weight * now.velocity.square()).mean()
    cost = current.cost(block_costs(model, now))
    run.gauge[level].lerp_(torch.stack((cost, 10 * error.log10())).detach(), 0.1 if run.gauge[level].any() else 1.0)
    unmoved = current.unmoved(MOVING_SHARE) if budget <= MOVING_BUDGET else 0.0
    return torch.log(error + 1e-6) + recipe.flops_weight * ((cost - budget) ** 2 + unmoved)


def _values(model: Flux, samples: Samples) -> list[Tensor]:
    """What every block computes for every token on the dense model."""
    with torch.no_grad():
        current = TrainingPass(Gates(), samples.context.shape[1], samples.sigma)
        routed(model, current, samples)
    return current.values


def _update(run: RouterRun, recipe: Recipe, progress: float, team: Team) -> None:
    warm = min(1.0, (run.step + 1) / 20)
    rate = recipe.rate * warm * (0.02 + 0.98 * math.cos(progress * math.pi / 2) ** 2)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["pace"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    team.wait()
    run.step += 1


def _summary(run: RouterRun, recipe: Recipe) -> str:
    """`budget→cost error` for each budget."""
    pairs = zip(recipe.budgets, run.gauge.tolist())
    return " · ".join(f"{budget:.2g}→{cost:.2f} {error:.1f} dB" for budget, (cost, error) in pairs)


def save(run: RouterRun, path: Path) -> None:
    state = {
        "gates": run.gates.state_dict(),
        "shifts": run.shifts.detach(),
        "optimizer": run.optimizer.state_dict(),
        "seed": run.seed,
        "step": run.step,
        "gauge": run.gauge,
    }
    write_atomically(path, lambda partial: torch.save(state, partial))


def load(run: RouterRun, path: Path) -> None:
    """Continue `run` where `path` was saved."""
    state = torch.load(path, weights_only=True)
    run.gates.load_state_dict(state["gates"])
    run.shifts.data.copy_(state["shifts"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.seed, run.step = state["seed"], state["step"]
    run.gauge.copy_(state["gauge"])
