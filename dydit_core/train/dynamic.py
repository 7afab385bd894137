"""DyDiT's own fine-tune of a DiT or SiT: the network and its routers learn together (arXiv 2410.03456 §3.3–3.4).

Routers have the names and shapes of the authors' March 2025 files. While they train, everything is computed and what a
gate shuts is multiplied by 0. Loss: the diffusion loss of the routed network, (mean cost − target)², and in a warm-up the
diffusion loss of the un-routed one. The target falls from 1. Where the released train.py errs, this does not:

- Its noise keeps its size to the end, so that a gate is open with some chance in training and always or never
  afterwards. Here it falls to almost nothing, and what was trained is what the threshold does.
- It takes two optimizer steps for each gradient, the first one unclipped. Here it is one.
- Heads and channel groups that are always open should be those that matter most; the code that sorts them was not
  released. `sort_units` sorts by magnitude.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..families.linear import gated, split_heads
from ..models.dit import DiT, DiTBlock, DiTConfig, modulate
from .base import Run, Stage
from .diffusion import Labelled, draw_batch, error
from .gates import straight_through
from .router import MOVING_SHARE

TOKEN_REDUCTION = 16
# The authors'. It is that of the gradient alone, as it moves no logit past the threshold: wide, so that none is ever out of reach.
TAU = 5.0
# All gates are open at first, yet within reach of the noise.
FIRST_BIAS = 2.0
# The authors weight the cost by 2 against a loss that a long training has made small.
FLOPS_WEIGHT = 4.0


class Router(nn.Module):
    """Logits of heads or channel groups by the timestep's embedding; the first unit has none, it is always on."""

    def __init__(self, width: int, units: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, units - 1)


class TokenSelection(nn.Module):
    """One logit for each token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = width // TOKEN_REDUCTION
        self.mlp_head = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, 1))


@dataclass
class Decisions:
    """One pass through the network: the timestep's `embedding` [rows, width], the `generator` of the noise on the logits and its
    `scale` (0: the plain threshold). Blocks add the share of heads, of groups and of tokens [rows] that they keep."""

    embedding: Tensor
    generator: torch.Generator | None = None
    scale: float = 0.0
    kept: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def gates(self, logits: Tensor) -> Tensor:
        return straight_through((logits + self.noise(*logits.shape)) / TAU)

    def noise(self, *sizes: int) -> Tensor:
        if not self.scale:
            return torch.zeros(sizes)
        return self.scale * torch.logit(torch.rand(sizes, generator=self.generator).clamp(1e-6, 1 - 1e-6))

    def cost(self, block: DiTBlock, tokens: int) -> Tensor:
        """Multiplications in attention and MLP, over those of the un-routed blocks [rows]; what the authors' loss counts."""
        width, hidden = block.hidden_size, block.mlp.fc1.out_features
        attention, mlp = 4 * tokens * width**2 + 2 * tokens**2 * width, 2 * tokens * width * hidden
        spent = [heads * attention + groups * kept * mlp for heads, groups, kept in self.kept]
        return torch.stack(spent).mean(0) / (attention + mlp)


class DynamicBlock(DiTBlock):
    """A DiT block with routers. Where `transformer_options` has no "decisions", it is the block without them."""

    def __init__(self, config: DiTConfig, *args: object, **made: object) -> None:
        super().__init__(config, *args, **made)
        self.attn_rate = Router(config.hidden_size, config.num_heads)
        self.mlp_rate = Router(config.hidden_size, config.num_heads)
        self.token_selection = TokenSelection(config.hidden_size)

    def forward(self, x: Tensor, condition: Tensor, transformer_options: dict | None = None) -> Tensor:
        decisions = (transformer_options or {}).get("decisions")
        if decisions is None:
            return super().forward(x, condition, transformer_options)
        heads, groups = (F.pad(decisions.gates(rate.router(decisions.embedding)), (1, 0), value=1.0)
                         for rate in (self.attn_rate, self.mlp_rate))
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        qkv = self.attn.qkv(modulate(self.norm1(x), shift1, scale1))
        attended = self.attend(self.attention, *split_heads(qkv, 3, self.hidden_size // self.num_heads), transformer_options)
        x = torch.addcmul(x, gate1, self.attn.proj(gated(attended, heads)))
        hidden = gated(F.gelu(self.mlp.fc1(modulate(self.norm2(x), shift2, scale2)), approximate="tanh"), groups)
        tokens = decisions.gates(self.token_selection.mlp_head(x).squeeze(-1).float())
        decisions.kept.append((heads.mean(1), groups.mean(1), tokens.mean(1)))
        return torch.addcmul(x, gate2 * tokens[..., None], self.mlp.fc2(hidden))


def with_routers(dense: DiT) -> DiT:
    """The same network, its heads and channels sorted, with routers that open everything."""
    model = DiT(dense.config, block=DynamicBlock)
    model.load_state_dict(dense.state_dict(), strict=False)
    sort_units(model)
    for block in model.blocks:
        nn.init.xavier_uniform_(block.token_selection.mlp_head[0].weight)
        nn.init.zeros_(block.token_selection.mlp_head[0].bias)
        for last in (block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]):
            nn.init.zeros_(last.weight)
            nn.init.constant_(last.bias, FIRST_BIAS)
    return model


@torch.no_grad()
def sort_units(model: DiT) -> None:
    """Order the heads of every block and the channels of its MLP by the magnitude of what they add, largest first; the network
    stays the same function."""
    for block in model.blocks:
        heads, size = block.num_heads, block.hidden_size // block.num_heads
        values, out = block.attn.qkv.weight.unflatten(0, (3, heads, size))[2], block.attn.proj.weight.unflatten(1, (heads, size))
        order = (values.flatten(1).norm(dim=1) * out.transpose(0, 1).flatten(1).norm(dim=1)).argsort(descending=True)
        lines = (order[:, None] * size + torch.arange(size)).flatten()
        for param in (block.attn.qkv.weight, block.attn.qkv.bias):
            param.copy_(param.unflatten(0, (3, -1))[:, lines].flatten(0, 1))
        block.attn.proj.weight.copy_(block.attn.proj.weight[:, lines])
        first, second = block.mlp.fc1, block.mlp.fc2
        order = (first.weight.norm(dim=1) * second.weight.norm(dim=0)).argsort(descending=True)
        for param in (first.weight, first.bias):
            param.copy_(param[order])
        second.weight.copy_(second.weight[:, order])


@dataclass(frozen=True)
class DynamicDenoising:
    """Objective: DyDiT's loss. The cost's target is 1 for the first `full` of `steps` steps, then falls to `target` over `falling`
    of them; for the first `complete` the un-routed network is held to the diffusion loss too.

    The cost's mean is taken over the rows of a portion, which are spread over all noise levels as a batch is: pictures and
    noise levels spend differently within it.
    """

    data: Labelled
    steps: int
    target: float = 0.5
    full: float = 0.05
    falling: float = 0.4
    complete: float = 0.5
    noise: float = 1.0
    last_noise: float = 0.1
    portion: int = 8

    def __call__(self, run: Run, stage: Stage, generator: torch.Generator) -> Callable[[slice], Tensor]:
        model, progress = run.model, run.step / self.steps
        batch = draw_batch(model, self.data, stage, generator)
        tokens = batch.x[0, 0].numel() // model.patch_size**2
        target = 1 - (1 - self.target) * min(max((progress - self.full) / self.falling, 0.0), 1.0)
        scale = self.noise + (self.last_noise - self.noise) * progress
        seed = int(torch.randint(1 << 62, (1,), generator=generator))

        def loss(rows: slice) -> Tensor:
            return torch.stack([part(slice(start, start + self.portion)) for start in range(rows.start, rows.stop, self.portion)]).sum()

        def part(rows: slice) -> Tensor:
            noise = torch.Generator().manual_seed(seed + rows.start)
            decisions = Decisions(model.embed_time(batch.time[rows], batch.x.dtype), noise, scale)
            found = error(batch.predict(model, rows, {"decisions": decisions}), batch, rows)
            if progress < self.complete:
                found = found + error(batch.predict(model, rows), batch, rows)
            cost = decisions.cost(model.blocks[0], tokens).mean()
            # Tokens would else leave all saving to widths, which are sooner shut.
            unmoved = sum((share.mean() - max(target, MOVING_SHARE)).relu().square() for block in decisions.kept for share in block) / len(decisions.kept)
            return (found.mean() + FLOPS_WEIGHT * ((cost - target) ** 2 + unmoved)) * len(found) / stage.batch

        return loss


def router_pace(name: str) -> float:
    """What decides about tokens learns faster than the rest: it has some hundred steps to take sides in, where the authors' had 150,000.

    Not the layer before it: most of a residual is common to all tokens, so that its units would shut for all of them, or pull them all one
    way, out of the gradient's reach. Nor widths, which have a number for each of E_t's: they would pay all of the budget before a token is skipped.
    """
    return 40.0 if "token_selection.mlp_head.2" in name else 1.0
