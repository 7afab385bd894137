"""DiT and SiT blocks run in parts, over `models.dit` with whichever layers the host gave it.

DyDiT (arXiv 2410.03456 §3): a skipped token skips the MLP; the attention always runs on all tokens, so every one of them
is a query, a key and a value, and nothing else is dead. Tokens are taken out before the LayerNorm and the modulation of
the MLP, which work on each token alone, and those of all rows make one product. Heads and channel groups that are off are
cut out of the weights (see `linear`). At full capacity the result equals the block's own forward.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import flops
from ..blocks import Backend, Pass
from ..models.dit import FLOW, modulate, timestep
from ..parts import BlockCost, Gate, Geometry
from ..td_lora import TimestepLoRA
from .linear import channels, fused, gated, linear, split_heads, two_layers

_LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
_BLOCK_PARTS = (*_LAYERS, "norm1", "norm2", "adaLN_modulation", "num_heads", "hidden_size")
_MODEL_PARTS = ("x_embedder", "t_embedder", "embed_time", "config.prediction")
_CASTABLE = (torch.float32, torch.bfloat16, torch.float16)


class DiTFamily:
    name, stack = "DiT", "blocks"
    title = "class-conditional DiT"
    model_parts: tuple[str, ...] = (*_MODEL_PARTS, "y_embedder")
    # Skipping a token takes no rows or columns of a layer.
    cut_by_tokens: tuple[str, ...] = ()
    cut_by_width = _LAYERS

    def refusal(self, model: nn.Module) -> str | None:
        name, blocks = type(model).__name__, getattr(model, "blocks", None)
        if not isinstance(blocks, nn.ModuleList) or not len(blocks):
            return f"{name} has no DiT blocks (blocks)"
        lacking = [part for part in self.model_parts if not _has(model, part)]
        if lacking:
            return f"{name} has blocks but is no {self.title} (it lacks {', '.join(lacking)})"
        lacking = [part for part in _BLOCK_PARTS if not all(_has(block, part) for block in blocks)]
        if lacking:
            return f"{name} is a DiT relative whose blocks lack {', '.join(lacking)}"
        width, made = blocks[0].hidden_size, blocks[0].attn.qkv.out_features
        if made != 3 * width or blocks[0].mlp.fc1.out_features != blocks[0].mlp.fc2.in_features:
            return f"{name} is a DiT relative whose attention or MLP is not as wide as DiT's"
        return None

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return list(model.blocks)

    def names(self, model: nn.Module) -> list[str]:
        return [f"blocks.{index}" for index in range(len(model.blocks))]

    def sizes(self, model: nn.Module) -> tuple[int, float]:
        block = model.blocks[0]
        return block.hidden_size, block.mlp.fc1.out_features / block.hidden_size

    def geometry(self, model: nn.Module, image_tokens: int, context: Tensor | None = None) -> Geometry:
        """The class is no token: it is in the condition alone."""
        return Geometry(image_tokens, 0, *self.sizes(model))

    def costs(self, model: nn.Module, geometry: Geometry, backend: Backend) -> list[BlockCost]:
        def whole(block: nn.Module) -> frozenset[str]:
            return frozenset(name for name, layer in self.layers(block).items() if backend.unsliceable(layer) is not None)

        return [flops.dit_block(geometry, self.seen(model, index, geometry), whole(block)) for index, block in enumerate(model.blocks)]

    def seen(self, model: nn.Module, index: int, geometry: Geometry) -> int:
        """Tokens that each token sees in block number `index`."""
        return geometry.image_tokens

    def layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """The linear layers of a block that work on tokens, by name."""
        return {name: block.get_submodule(name) for name in _LAYERS}

    def added_costs(self, model: nn.Module, geometry: Geometry, low_rank: TimestepLoRA | None) -> list[BlockCost]:
        if low_rank is None:
            return []
        ranks = [{layer: rank for (block, layer), rank in low_rank.ranks.items() if block == index} for index in range(len(model.blocks))]
        return [flops.dit_block_low_rank(geometry, of_block) for of_block in ranks]

    def level(self, model: nn.Module, sigmas: Tensor) -> Tensor:
        return sigmas if model.config.prediction == FLOW else sigmas / (1 + sigmas)

    def time_embedding(self, model: nn.Module, backend: Backend, sigmas: Tensor, dtype: torch.dtype) -> Tensor:
        """Computed in the type of the embedder's weights, unless they are packed."""
        first = model.t_embedder.mlp[0]
        time = timestep(sigmas.to(backend.device(first)), model.config.prediction)
        return model.embed_time(time, first.weight.dtype if first.weight.dtype in _CASTABLE else dtype)

    def forward(self, block: nn.Module, index: int, current: Pass, backend: Backend, x: Tensor, condition: Tensor,
                transformer_options: dict | None = None) -> Tensor:
        """Attention on everything, the MLP on the kept tokens; inputs as of `models.dit.DiTBlock`."""
        layer = partial(linear, current, backend, index, block)
        width, head = current.width(index), block.hidden_size // block.num_heads
        shift1, scale1, gate1, shift2, scale2, gate2 = block.adaLN_modulation(condition)[:, None].chunk(6, dim=-1)
        qkv = layer("attn.qkv", modulate(block.norm1(x), shift1, scale1), fused(width, 3, head, block.hidden_size))
        attn = block.attend(backend.attention, *split_heads(qkv, 3, head), transformer_options)
        attn = gated(attn, width.head_gate)
        x = torch.addcmul(x, gate1, layer("attn.proj", attn, columns=channels(width.heads, head, block.hidden_size)))

        kept = current.select(Gate(index, current.sigma, x, condition, partial(block.norm2, x)))
        some, shift, scale = (part if kept is None else kept.take(part) for part in (x, shift2, scale2))
        values = two_layers(current, backend, index, block, "mlp", ("fc1", "fc2"), partial(F.gelu, approximate="tanh"),
                            modulate(block.norm2(some), shift, scale), width)
        return current.update(index, x, gate2, kept, values)


def _has(module: nn.Module, path: str) -> bool:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None
