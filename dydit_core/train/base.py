"""Trains a FLUX from nothing: stages, checkpoints that resume exactly, an average of the weights.

All randomness of a step comes from a generator seeded with the step number, so a run that was interrupted and
resumed takes the very same steps as one that was not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ..models.flux import Flux, FluxConfig
from ..storage import write_atomically
from .flow import noisy
from .muon import Muon
from .team import Team
from .team import share as share_weights

# About 100 steps: a longer average would still hold much of the time before the learning rate fell.
EMA_DECAY = 0.99
PROMPT_DROPOUT = 0.12
WARM_STEPS = 30
# Rows that a member of a team takes at a time.
PORTION = 4
ADAM_BETAS = (0.9, 0.99)

Log = Callable[[str], None]


class Data(Protocol):
    """What training draws from; rows are chosen by the caller."""

    def __len__(self) -> int: ...

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(latents [rows, C, H, W], contexts [rows, tokens, dim], pooled [rows, dim]), all fp32."""
        ...


@dataclass(frozen=True)
class Stage:
    """`steps` steps on square windows of `window` tokens a side; the learning rate goes linearly `start` → `end`.

    A window keeps its true positions, so a small one teaches what stands where at a fraction of the cost.
    """

    name: str
    steps: int
    batch: int
    window: int
    start: float
    end: float


@dataclass
class Run:
    """Everything a checkpoint holds. `empty` is the encoded empty prompt, (context [1, …], pooled [1, …])."""

    model: Flux
    ema: dict[str, Tensor]
    optimizers: tuple[Muon, torch.optim.AdamW]
    empty: tuple[Tensor, Tensor]
    seed: int = 0
    step: int = 0
    losses: list[float] = field(default_factory=list)


def new_run(config: FluxConfig, empty: tuple[Tensor, Tensor], seed: int = 0) -> Run:
    torch.manual_seed(seed)
    model = Flux(config)
    _init(model)
    matrices = [p for name, p in model.named_parameters() if _is_block_matrix(name, p)]
    rest = [p for name, p in model.named_parameters() if not _is_block_matrix(name, p)]
    optimizers = (Muon(matrices, lr=0.0), torch.optim.AdamW(rest, lr=0.0, betas=ADAM_BETAS, weight_decay=0.0))
    ema = {name: p.detach().clone() for name, p in model.named_parameters()}
    for optimizer in optimizers:
        create_state(optimizer)
    return Run(model, ema, optimizers, empty, seed)


def share(run: Run) -> None:
    """Move everything that a team works on into shared memory."""
    run.model.share_memory()
    for tensor in (*run.ema.values(), *run.empty):
        tensor.share_memory_()
    for optimizer in run.optimizers:
        share_weights(optimizer)


def use_bfloat16_blocks(model: Flux, compile_blocks: bool) -> None:
    """Run the blocks' matrix products in bfloat16 around an fp32 residual stream, compiled if asked."""
    # On CPUs without AMX the fused attention takes twice as long as plain bfloat16 matrix products.
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.allow_fp16_bf16_reduction_math_sdp(True)
    for block in (*model.double_blocks, *model.single_blocks):
        block.forward = torch.autocast("cpu", dtype=torch.bfloat16)(block.forward)
        if compile_blocks:
            block.compile()


def train(run: Run, data: Data, stages: tuple[Stage, ...], checkpoint: Path, log: Log = print,
          save_every: int = 100, team: Team = Team()) -> None:
    """Take the steps of `stages` that `run` has not taken yet, saving to `checkpoint` on the way and at the end."""
    clock = time.monotonic()
    for step, stage, rate in _schedule(stages):
        if step < run.step:
            continue
        run.losses.append(train_step(run, data, stage, rate, team))
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


def train_step(run: Run, data: Data, stage: Stage, rate: float, team: Team = Team()) -> float:
    """One optimizer step; returns its loss (mean squared error of the velocity)."""
    generator = torch.Generator().manual_seed(run.seed * 1_000_003 + run.step)
    index = torch.randint(len(data), (stage.batch,), generator=generator)
    latents, context, pooled = data.batch(index, generator)
    dropped = torch.rand(stage.batch, generator=generator) < PROMPT_DROPOUT
    context = torch.where(dropped[:, None, None], run.empty[0], context)
    pooled = torch.where(dropped[:, None], run.empty[1], pooled)
    latents, positions = _window(run.model, latents, context.shape[1], stage.window, generator)
    batch = noisy(latents, generator)
    loss = 0.0
    for rows in team.portions(stage.batch, PORTION):
        velocity = run.model(batch.x[rows], batch.sigma[rows], context[rows], pooled[rows], positions=positions[rows])
        part = (velocity - batch.target[rows]).pow(2).sum() / batch.target.numel()
        part.backward()
        loss += part.item()
    loss = team.exchange(list(run.model.parameters()), loss)
    _update(run, rate, team)
    team.wait()
    run.step += 1
    return loss


def _update(run: Run, rate: float, team: Team) -> None:
    for optimizer in run.optimizers:
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    # Follows quickly at first: an average over the random start would be useless for long.
    decay = min(EMA_DECAY, (run.step + 1) / (run.step + 10))
    with torch.no_grad():
        for index, (name, param) in enumerate(run.model.named_parameters()):
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


def _window(model: Flux, latents: Tensor, text_tokens: int, side: int, generator: torch.Generator
            ) -> tuple[Tensor, Tensor]:
    """Cut a `side` × `side` token window out of every row; returns it with its position ids [rows, tokens, 3]."""
    patch = model.config.patch_size
    rows, _, height, width = latents.shape
    top = torch.randint(height // patch - side + 1, (rows,), generator=generator)
    left = torch.randint(width // patch - side + 1, (rows,), generator=generator)
    positions = model.positions(text_tokens, side, side).repeat(rows, 1, 1)
    positions[:, text_tokens:, 1] += top[:, None]
    positions[:, text_tokens:, 2] += left[:, None]
    size = side * patch
    cut = [row[:, y : y + size, x : x + size] for row, y, x in zip(latents, (top * patch).tolist(), (left * patch).tolist())]
    return torch.stack(cut), positions


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
    return param.ndim == 2 and "blocks." in name and "mod" not in name


def _init(model: Flux) -> None:
    """Xavier weights; modulations and the last layer start at zero, so every block starts as the identity."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            closed = name.endswith(("mod.lin", "modulation.lin", "adaLN_modulation.1", "final_layer.linear"))
            nn.init.zeros_(module.weight) if closed else nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
