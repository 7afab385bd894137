"""Trains a whole network: stages, checkpoints that resume exactly, an average of the weights.

What is learned is an `Objective`. All randomness of a step comes from a generator seeded with the step number, so a run
that was interrupted and resumed takes the very same steps as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..storage import write_atomically
from .muon import Muon
from .team import Team
from .team import share as share_weights

# About 100 steps: a longer average would still hold much of the time before the learning rate fell.
EMA_DECAY = 0.99
WARM_STEPS = 30
ADAM_BETAS = (0.9, 0.99)

Log = Callable[[str], None]


@dataclass(frozen=True)
class Stage:
    """`steps` steps on square windows of `window` tokens a side (None: on all there is); the learning rate goes linearly
    `start` → `end`.

    A window keeps its true positions, so a small one teaches what stands where at a fraction of the cost.
    """

    name: str
    steps: int
    batch: int
    window: int | None
    start: float
    end: float


@dataclass
class Run:
    """Everything a checkpoint holds."""

    model: nn.Module
    ema: dict[str, Tensor]
    optimizers: tuple[Muon, torch.optim.AdamW]
    seed: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)


class Objective(Protocol):
    """What is learned. `portion`: rows of a batch that a member of a team takes at a time."""

    portion: int

    def __call__(self, run: Run, stage: Stage, generator: torch.Generator) -> Callable[[slice], Tensor]:
        """Draw the batch of a step; returns the loss of some of its rows, as their part of the mean over all of them."""
        ...


def new_run(model: nn.Module, seed: int = 0, paces: Callable[[str], float] = lambda name: 1.0) -> Run:
    """Train `model` as it is. `paces`: by what a parameter's learning rate is multiplied, by its name."""
    matrices = [param for name, param in _trained(model) if _is_block_matrix(name, param)]
    by_pace: dict[float, list[Tensor]] = {}
    for name, param in _trained(model):
        if not _is_block_matrix(name, param):
            by_pace.setdefault(paces(name), []).append(param)
    rest = [{"params": params, "pace": pace} for pace, params in by_pace.items()]
    optimizers = (Muon(matrices, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=ADAM_BETAS, weight_decay=0.0))
    ema = {name: param.detach().clone() for name, param in _trained(model)}
    for optimizer in optimizers:
        create_state(optimizer)
    return Run(model, ema, optimizers, seed)


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, param) for name, param in model.named_parameters() if param.requires_grad]


def share(run: Run) -> None:
    """Move everything that a team works on into shared memory."""
    run.model.share_memory()
    for tensor in run.ema.values():
        tensor.share_memory_()
    for optimizer in run.optimizers:
        share_weights(optimizer)


def prefer_plain_attention() -> None:
    """In bfloat16: on CPUs without AMX the fused attention takes twice as long as plain matrix products."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)


def use_bfloat16_blocks(blocks: Iterable[nn.Module], compile_blocks: bool = False) -> None:
    """Run the matrix products of the blocks in bfloat16 around an fp32 residual stream, compiled if asked."""
    prefer_plain_attention()
    for block in blocks:
        block.forward = torch.autocast("cpu", dtype=torch.bfloat16)(block.forward)
        if compile_blocks:
            block.compile()


def train(run: Run, objective: Objective, stages: tuple[Stage, ...], checkpoint: Path, log: Log = print,
          save_every: int = 100, team: Team = Team()) -> None:
    """Take the steps of `stages` that `run` has not taken yet, saving to `checkpoint` on the way and at the end."""
    clock = time.monotonic()
    for step, stage, rate in _schedule(stages):
        if step < run.step:
            continue
        run.losses.append(train_step(run, objective, stage, rate, team))
        if not team.leads:
            continue
        if run.step % 25 == 0:
            recent = run.losses[-25:]
            seconds, clock = time.monotonic() - clock, time.monotonic()
            log(f"step {run.step} {stage.name} loss {sum(recent) / len(recent):.4f} lr {rate:.2e} {seconds:.0f} s")
        if run.step % save_every == 0:
            save(run, checkpoint)
        if run.step == _end_of(stages, stage.name):
            save(run, checkpoint.with_name(f"{checkpoint.stem}_{stage.name}{checkpoint.suffix}"))
    if team.leads:
        save(run, checkpoint)


def train_step(run: Run, objective: Objective, stage: Stage, rate: float, team: Team = Team()) -> float:
    """One optimizer step; returns its loss."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
    loss_of, loss = objective(run, stage, generator), 0.0
    for rows in team.portions(stage.batch, objective.portion):
        part = loss_of(rows)
        part.backward()
        loss += part.item()
    loss = team.exchange([param for _, param in _trained(run.model)], loss)
    _update(run, rate, team)
    team.wait()
    run.step += 1
    return loss


def _update(run: Run, rate: float, team: Team) -> None:
    for optimizer in run.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get("pace", 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Follows quickly at first: an average over the random start would be useless for long.
    decay = min(EMA_DECAY, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        for index, (name, param) in enumerate(_trained(run.model)):
            if team.owns(index):
                run.ema[name].lerp_(param, 1 - decay)


def save(run: Run, path: Path) -> None:
    state = {
        "model": run.model.state_dict(),
        "ema": run.ema,
        "optimizers": [optimizer.state_dict() for optimizer in run.optimizers],
        "seed": run.seed,
        "step": run.step,
        "losses": run.losses,
    }
    write_atomically(path, lambda partial: torch.save(state, partial))


def load(run: Run, path: Path) -> None:
    """Continue `run` where `path` was saved."""
    state = torch.load(path, weights_only=True)
    run.model.load_state_dict(state["model"])
    run.ema = state["ema"]
    for optimizer, saved in zip(run.optimizers, state["optimizers"]):
        optimizer.load_state_dict(saved)
    run.seed, run.step, run.losses = state["seed"], state["step"], state["losses"]


def _schedule(stages: tuple[Stage, ...]) -> Iterator[tuple[int, Stage, float]]:
    """(step, stage, learning rate) of every step; the very first ones warm up."""
    step = 0
    for stage in stages:
        for local in range(stage.steps):
            rate = stage.start + (stage.end - stage.start) * local / stage.steps
            yield step, stage, rate * min(1.0, (step + 1) / WARM_STEPS)
            step += 1


def _end_of(stages: tuple[Stage, ...], name: str) -> int:
    names = [stage.name for stage in stages]
    return sum(stage.steps for stage in stages[: names.index(name) + 1])


def cut_windows(latents: Tensor, patch: int, side: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A random window of `side` × `side` tokens of each of `latents` [rows, C, H, W], and its first token's row and column [rows]."""
    rows, _, height, width = latents.shape
    top = torch.randint(height // patch - side + 1, (rows,), generator=generator)
    left = torch.randint(width // patch - side + 1, (rows,), generator=generator)
    size = side * patch
    cut = [row[:, y : y + size, x : x + size] for row, y, x in zip(latents, (top * patch).tolist(), (left * patch).tolist())]
    return torch.stack(cut), top, left


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the momenta now: made at the first step, they would be private to the member that takes it."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for param in params:
        param.grad = torch.zeros_like(param)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for param in params:
        for value in optimizer.state[param].values():
            value.zero_()


def _is_block_matrix(name: str, param: Tensor) -> bool:
    """What Muon is for; routers decide by the size of their outputs, which it would not keep."""
    return param.ndim == 2 and "blocks." in name and not any(word in name for word in ("mod", "router", "token_selection"))


def init(model: nn.Module, closed: tuple[str, ...]) -> None:
    """Xavier weights; layers whose names end in one of `closed` start at zero, so that every block starts as the identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight) if name.endswith(closed) else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
