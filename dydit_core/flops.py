"""FLOPs of a FLUX block, as a function of the image tokens it computes (1 MAC = 2 FLOPs).

Only matrix products count, as `torch.utils.flop_counter` counts them; norms, RoPE, activations and gates do not.
"""

from __future__ import annotations

from .parts import BlockCost, Geometry


def linear(tokens: float, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def attention(queries: float, keys: float, width: int) -> float:
    """Scores and weighted sum over all heads."""
    return 4.0 * queries * keys * width


def flux_double(geometry: Geometry) -> BlockCost:
    """Skipping an image token saves its two MLP products; everything else runs on all tokens."""
    width, hidden = geometry.width, int(geometry.width * geometry.mlp_ratio)
    modulation = 2 * linear(1, width, 6 * width)
    projections = linear(geometry.tokens, width, 4 * width)
    text_mlp = 2 * linear(geometry.text_tokens, width, hidden)
    fixed = modulation + projections + attention(geometry.tokens, geometry.tokens, width) + text_mlp
    return BlockCost(fixed, 2 * linear(1, width, hidden))


def flux_single(geometry: Geometry, sliced: bool = True) -> BlockCost:
    """A skipped image token is a key and a value only: no query, attention row, MLP or output columns.

    Where the fused first layer cannot be sliced (`sliced=False`) it runs whole on every token.
    """
    width, hidden = geometry.width, int(geometry.width * geometry.mlp_ratio)
    query = linear(1, width, width) + linear(1, width, hidden)
    out = linear(1, width + hidden, width) + attention(1, geometry.tokens, width)
    fixed = linear(1, width, 3 * width) + linear(geometry.tokens, width, 2 * width) + geometry.text_tokens * (query + out)
    if sliced:
        return BlockCost(fixed, query + out)
    return BlockCost(fixed + geometry.image_tokens * query, out)
