"""What the published DyFLUX forward computes in a single block, for comparison (DyDiT++, arXiv 2504.06803).

There the query, the attention row and the router's reading of every token are computed, and the skipped ones thrown
away before the MLP and the output layer. Here they are not computed. The same tokens kept give the same output.
Written from the description of the method; the double block is ours in both, as they are alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import flops
from ..blocks import Backend, Pass
from ..families.flux import FluxFamily
from ..gather import gather
from ..models.flux import FluxConfig
from ..parts import Allotment, BlockCost, Gate, Geometry, Outlook, Setting
from ..routers.learned import LearnedRouter, LearnedState

# Mean fraction of image tokens kept at which the published forward of FLUX.1-lite (4,096 + 512 tokens) is 21.2 T MACs.
OFFICIAL_KEEP = 0.4387
DENSE, PUBLISHED, OURS = "dense", "as published", "without dead queries"


def published_single(geometry: Geometry) -> BlockCost:
    """Projections to heads and the attention for every token; MLP and output layer for text and kept image tokens."""
    width, hidden = geometry.width, geometry.hidden
    kept = flops.linear(1, width, hidden) + flops.linear(1, width + hidden, width)
    fixed = (flops.linear(1, width, 3 * width) + flops.linear(geometry.tokens, width, 3 * width)
             + flops.attention(geometry.tokens, geometry.tokens, width))
    return BlockCost(fixed=fixed + geometry.text_tokens * kept, token=kept)


class PublishedFamily(FluxFamily):
    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        ours = super().costs(model, geometry, backend)
        return ours[:len(model.double_blocks)] + [published_single(geometry)] * len(model.single_blocks)

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, *args: Any, **kwargs: Any) -> Any:
        if hasattr(block, "img_mlp"):
            return super().forward(block, index, current, backend, *args, **kwargs)
        return _single_block(block, index, current, backend, *args, **kwargs)


def _single_block(block: nn.Module, index: int, current: Pass, backend: Backend, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
    text, size = current.text_tokens, block.hidden_size
    mod, _ = block.modulation(vec)
    normed = block.pre_norm(x)
    kept = current.select(Gate(index, current.sigma, x[:, text:], vec, lambda: normed[:, text:], x[:, :text], lambda: normed[:, :text]))
    modulated = torch.addcmul(mod.shift, normed, 1 + mod.scale)
    weight, bias = block.linear1.weight, block.linear1.bias
    qkv = F.linear(modulated, weight[:3 * size], bias[:3 * size])
    q, k, v = qkv.unflatten(-1, (3, block.num_heads, -1)).permute(2, 0, 3, 1, 4)
    q, k = block.norm(q, k, v)
    attn = backend.attention(backend.rotate(q, pe), backend.rotate(k, pe), v, None, None)
    if kept is not None:
        ((_, tokens),) = kept.parts  # the benchmark has one branch
        chosen = torch.cat((torch.arange(text, device=x.device).expand(len(tokens), -1), tokens + text), dim=1)
        attn, modulated = gather(attn, chosen), gather(modulated, chosen)
    mlp = block.mlp_act(F.linear(modulated, weight[3 * size:], bias[3 * size:]))
    out = block.linear2(torch.cat((attn, mlp), dim=2))
    img = current.update(index, x[:, text:], mod.gate, kept, out[:, text:])
    return torch.cat((x[:, :text] + out[:, :text] * mod.gate, img), dim=1)


@dataclass(frozen=True, eq=False)
class EvenRouter(LearnedRouter):
    """Learned scores, and the same fraction of tokens in every block at every evaluation, whatever the budget."""

    fraction: float = OFFICIAL_KEEP

    def start(self, setting: Setting) -> EvenState:
        return EvenState(self)


class EvenState(LearnedState):
    def keep(self, outlook: Outlook) -> Allotment:
        return Allotment(torch.full((len(outlook.costs),), self.config.fraction, dtype=torch.float64))


def whole_model(config: FluxConfig, keep: float, image_tokens: int = 4096, text_tokens: int = 512) -> dict[str, float]:
    """MACs of all blocks of a model, by lane, when every block keeps `keep` of the image tokens."""
    geometry, kept = Geometry(image_tokens, text_tokens, config.hidden_size, config.mlp_ratio), keep * image_tokens
    double, single, theirs = flops.flux_double(geometry), flops.flux_single(geometry), published_single(geometry)

    def macs(single: BlockCost, tokens: float) -> float:
        return (config.depth * double.at(tokens) + config.depth_single_blocks * single.at(tokens)) / 2

    return {DENSE: macs(single, image_tokens), PUBLISHED: macs(theirs, kept), OURS: macs(single, kept)}
