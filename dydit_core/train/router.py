"""Trains the gates of an adapter (SDT, TDW) and its TD-LoRA for a frozen base, with the family code that runs at inference.

DyDiT (arXiv 2410.03456 §3.3–3.4, released train.py): noisy hard gates (see `gates`), and (mean cost − budget)² holds the
FLOPs. Three things differ. The base is frozen and is its own teacher: the loss is how far a few gated evaluations in a row
lead off the dense run (see `rollout`), weighted by what is left of it in the finished picture.
The router serves every budget: each step trains one of `budgets` under a shift of all logits that is learnt with it
and thrown away at the end, since the calibrated table of the adapter takes its place. And the distance enters as a
logarithm (in decibels, up to a factor), so that 0.9, where errors are small, counts as much as 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from ..parts import BlockCost
from ..routers.token import TokenScores
from ..routers.width import new_width_scores
from ..sampling import unsqueezed
from ..storage import write_atomically
from ..td_lora import new_low_rank
from .base import create_state
from .gates import Gates, Noise
from .rollout import roll_out
from .teacher import Teacher
from .team import Team
from .team import share as share_weights
from .told import ToldScores
from .trajectories import Trajectories, Window

# A shift moves one number where the scores move a vector, and is used by one step in as many as there are budgets.
SHIFT_PACE = 5
LOW_RANK_PACE = 0.1
# Above this shift every gate is open.
OPEN = 1e4
# At budgets up to the first, no gate of a block may let through more than the second: a head of a wide block is so useful,
# and every head of that block then so alike, that none would ever be the one to go.
MOVING_BUDGET, MOVING_SHARE = 0.5, 0.95


@dataclass(frozen=True)
class Recipe:
    """What is trained: token scores where `tokens`, widths of every head and of `groups` channel groups (0: no widths), a
    TD-LoRA of `experts` (0: none) and `rank`; for skipped tokens that `reuse` what was last computed, or for nothing in
    their place. `told`: the token scores know the budget (see `told`); otherwise one shift of them serves all. `counts`: the numbers
    of sampling steps it is trained on, `window` evaluations in a row.

    `align` weights the misalignment of features (see `alignment`).

    `batch` rows are taken `group` at a time, which share a budget and are spread over all noise levels. `noise`: scale of the
    logistic noise at the start; it falls to `last_noise`, so that what was trained is what the threshold does. A budget of
    1 opens every gate: it holds the low-rank additions to the base."""

    steps: int
    batch: int = 32
    group: int = 8
    rate: float = 6e-3
    budgets: tuple[float, ...] = (0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    counts: tuple[int, ...] = (4, 8, 20, 28)
    window: int = 1
    tau: float = 1.0
    noise: float = 0.5
    last_noise: float = 0.1
    flops_weight: float = 50.0
    align: float = 0.0
    reuse: bool = False
    told: bool = False
    tokens: bool = True
    groups: int = 0
    experts: int = 0
    rank: int = 4

    @property
    def first(self) -> int:
        """Number of the first evaluation that has gates: with reuse the very first computes everything."""
        return int(self.reuse)


@dataclass
class RouterRun:
    """Everything a checkpoint holds. `shifts` [budgets] moves all logits at each budget of the recipe; `gauge`
    [budgets, 2] is a running mean of its cost and its error in dB; `losses` has one number for each step, `curve` now and then
    the step and its errors."""

    gates: Gates
    shifts: nn.Parameter
    optimizer: torch.optim.Optimizer
    gauge: Tensor
    seed: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)
    curve: list[tuple[int, list[float]]] = field(default_factory=list)

    @property
    def params(self) -> list[Tensor]:
        return [*self.gates.parameters(), self.shifts]


def carried(sigma: Tensor) -> Tensor:
    """How far an error of the velocity at `sigma` (0…1) is found in the finished picture: early ones grow, late ones do not.

    A fit to what the demo base does when tokens are skipped in one of ten steps: 4.0 at sigma 1, 2.5 at 0.85, 1.2 at
    0.6, 0.7 at 0.4.
    """
    return 0.6 + 3.2 * sigma**3


def new_gates(teacher: Teacher, recipe: Recipe, rank: int = 16) -> Gates:
    """Untrained: logits around 0, so that every gate is undecided; the low-rank additions add nothing."""
    blocks, (channels, _) = teacher.family.blocks(teacher.model), teacher.family.sizes(teacher.model)
    tokens = TokenScores(len(blocks), channels, rank, bias=0.0, stale=recipe.reuse, text=teacher.family.name == "FLUX") if recipe.tokens else None
    tokens = ToldScores(tokens, len(recipe.budgets)) if recipe.told else tokens
    width = new_width_scores(len(blocks), blocks[0].num_heads, recipe.groups) if recipe.groups else None
    if not recipe.experts:
        return Gates(tokens, width)
    sizes = {(index, name): (layer.in_features, layer.out_features) for index, block in enumerate(blocks)
             for name, layer in teacher.family.layers(block).items()}
    return Gates(tokens, width, new_low_rank(sizes, len(blocks), recipe.rank, recipe.experts))


def new_router_run(teacher: Teacher, data: Sequence[Trajectories], recipe: Recipe, rank: int = 16, seed: int = 0) -> RouterRun:
    """Logits start around 0; a shift starts where the noise alone keeps the fraction that its budget means."""
    torch.manual_seed(seed)
    gates = new_gates(teacher, recipe, rank)
    costs, tokens = block_costs(teacher, data[0]), teacher.tokens(data[0].x)
    closed = (0.0 if recipe.tokens else tokens), *((0.0, 0.0) if recipe.groups else (1.0, 1.0))
    floor = sum(cost.at(*closed) for cost in costs) / sum(cost.at(tokens) for cost in costs)
    kept = [min(max((budget - floor) / (1 - floor), 0.02), 0.98) for budget in recipe.budgets]
    gates.to(teacher.device)
    shifts = nn.Parameter((recipe.noise * torch.tensor(kept).logit()).to(teacher.device))
    scores = [param for part in (gates.tokens, gates.width) if part is not None for param in part.parameters()]
    added = list(gates.low_rank.parameters()) if gates.low_rank is not None else []
    groups = [{"params": params, "pace": pace} for params, pace in ((scores, 1.0), (added, LOW_RANK_PACE), ([shifts], SHIFT_PACE)) if params]
    optimizer = torch.optim.Adam(groups, lr=0.0, betas=(0.9, 0.98))
    create_state(optimizer)
    return RouterRun(gates, shifts, optimizer, torch.zeros(len(recipe.budgets), 2), seed)


def block_costs(teacher: Teacher, data: Trajectories) -> list[BlockCost]:
    return teacher.costs(data.x, tuple(part[:, 0] for part in data.conditioning))


def share(run: RouterRun) -> None:
    """Move everything that a team works on into shared memory."""
    run.gauge.share_memory_()
    share_weights(run.optimizer)


def train_step(run: RouterRun, teacher: Teacher, data: Sequence[Trajectories], recipe: Recipe, team: Team = Team()) -> float:
    """One optimizer step; returns its loss. The groups of a batch train one budget and one number of sampling steps each.

    Raises Diverged where the loss is no number; the weights are then as they were.
    """
    progress, groups, loss = run.step / recipe.steps, recipe.batch // recipe.group, 0.0
    seen: list[tuple[int, Tensor]] = []
    for rows in team.portions(recipe.batch, recipe.group):
        for group in range(rows.start // recipe.group, rows.stop // recipe.group):
            level = (run.step + group * len(recipe.budgets) // groups) % len(recipe.budgets)
            generator = torch.Generator().manual_seed((run.seed * 1_000_003 + run.step) * groups + group)
            found, measured = _loss(run, teacher, data, recipe, level, progress, generator)
            part = found / groups
            part.backward()
            loss += part.item()
            seen.append((level, measured))
    loss = team.exchange(run.params, loss)
    if not math.isfinite(loss):
        raise Diverged(f"The loss of step {run.step + 1} is {loss}; train with a lower rate (now {recipe.rate:g}).")
    for level, measured in seen:
        run.gauge[level].lerp_(measured, 0.1 if run.gauge[level].any() else 1.0)
    run.losses.append(loss)
    _update(run, recipe, progress, team)
    return loss


class Diverged(RuntimeError):
    """Training went wrong; the message says what to do."""


def _noise(gates: Gates, scale: float, rows: int, tokens: int, generator: torch.Generator, device: torch.device) -> Noise:
    """For one evaluation of `rows` rows and image tokens."""
    def logistic(*sizes: int) -> Tensor:
        return (scale * torch.logit(torch.rand(sizes, generator=generator).clamp(1e-6, 1 - 1e-6))).to(device)

    scores = logistic(gates.tokens.blocks, rows, tokens) if gates.tokens is not None else None
    if gates.width is None:
        return Noise(scores)
    return Noise(scores, *(logistic(rows, *part.shape[1:]) for part in (gates.width.heads, gates.width.groups)))


def _loss(run: RouterRun, teacher: Teacher, data: Sequence[Trajectories], recipe: Recipe, level: int, progress: float,
          generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Logarithm of the carried error, the distance from the budget number `level`, and gates that stay open; and the cost and
    the error in dB [2]."""
    budget, scale = recipe.budgets[level], recipe.noise + (recipe.last_noise - recipe.noise) * progress
    runs = data[int(torch.randint(len(data), (1,), generator=generator))]
    window = runs.draw(recipe.group, recipe.window, generator, recipe.first).to(teacher.device)
    noise = [_noise(run.gates, scale, recipe.group, teacher.tokens(window.x), generator, teacher.device) for _ in range(window.length)]
    shift = run.shifts[level] if budget < 1.0 else OPEN
    outcome = roll_out(teacher, run.gates.at(level), window, shift, noise, recipe.tau, recipe.reuse, recipe.align > 0)
    costs = block_costs(teacher, runs)
    cost = (torch.stack([current.cost(costs) for current in outcome.passes], dim=1) * window.share).sum() / recipe.group
    error = _error(outcome.drift, window, teacher)
    certain = torch.stack([current.certain for current in outcome.passes]).mean(0)
    unmoved = (certain - MOVING_SHARE).relu().square().sum() if budget <= MOVING_BUDGET else 0.0
    loss = torch.log(error + 1e-6) + recipe.flops_weight * ((cost - budget) ** 2 + unmoved)
    if outcome.misaligned is not None:
        loss = loss + recipe.align * torch.log(outcome.misaligned + 1e-6)
    return loss, torch.stack((cost, 10 * error.log10())).detach().cpu()


def _error(drift: Tensor, window: Window, teacher: Teacher) -> Tensor:
    """Squared distance from the dense run at the window's end over that of its way, each as it is found in the picture."""
    weight = unsqueezed(carried(teacher.level(window.sigmas[:, -2])), drift).square()
    (start, first), (end, last) = ((window.x[:, place], window.sigmas[:, place]) for place in (0, -1))
    way = teacher.mixed(end, last) - teacher.mixed(start, first)
    return (weight * teacher.mixed(drift, last).square()).mean() / (weight * way.square()).mean()


def _update(run: RouterRun, recipe: Recipe, progress: float, team: Team) -> None:
    warm = min(1.0, (run.step + 1) / 20)
    rate = recipe.rate * warm * (0.02 + 0.98 * math.cos(progress * math.pi / 2) ** 2)
    for group in run.optimizer.param_groups:
        group["lr"] = rate * group["pace"]
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    team.wait()
    run.step += 1


def summary(run: RouterRun, recipe: Recipe) -> str:
    """`budget→cost error` for each budget that was trained by now."""
    pairs = zip(recipe.budgets, run.gauge.tolist())
    return " · ".join(f"{budget:.2g}→{cost:.2f} {error:.1f} dB" for budget, (cost, error) in pairs if cost)


def save(run: RouterRun, path: Path) -> None:
    state = {
        "gates": run.gates.state_dict(),
        "shifts": run.shifts.detach(),
        "optimizer": run.optimizer.state_dict(),
        "seed": run.seed,
        "step": run.step,
        "gauge": run.gauge,
        "losses": run.losses,
        "curve": run.curve,
    }
    write_atomically(path, lambda partial: torch.save(state, partial))


def load(run: RouterRun, path: Path) -> None:
    """Continue `run` where `path` was saved."""
    state = torch.load(path, weights_only=True, map_location="cpu")
    run.gates.load_state_dict(state["gates"])
    run.shifts.data.copy_(state["shifts"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.seed, run.step, run.losses, run.curve = (state[key] for key in ("seed", "step", "losses", "curve"))
    run.gauge.copy_(state["gauge"])
