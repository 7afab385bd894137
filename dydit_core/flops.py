"""FLOPs of a block, as a function of the image tokens it computes (1 MAC = 2 FLOPs).

Only matrix products count, as `torch.utils.flop_counter` counts them; norms, RoPE, activations and gates do not.
"""

from __future__ import annotations

from collections.abc import Mapping

from .parts import BlockCost, Geometry


def linear(tokens: float, inputs: int, outputs: int) -> float:
    return 2.0 * tokens * inputs * outputs


def attention(queries: float, keys: float, width: int) -> float:
    """Scores and weighted sum over all heads."""
    return 4.0 * queries * keys * width


def flux_double(geometry: Geometry, whole: frozenset[str] = frozenset()) -> BlockCost:
    """Skipping an image token saves its two MLP products; heads are those of the joint attention, groups of the image MLP.

    Layers in `whole` cannot be cut and run at full width.
    """
    width, hidden = geometry.width, geometry.hidden
    fixed = 2 * linear(1, width, 6 * width) + 2 * linear(geometry.text_tokens, width, hidden)
    parts = {"fixed": fixed, "heads": attention(geometry.tokens, geometry.tokens, width)}
    for stream, tokens in (("img", geometry.image_tokens), ("txt", geometry.text_tokens)):
        for layer, outputs in (("qkv", 3 * width), ("proj", width)):
            _add(parts, "heads", f"{stream}_attn.{layer}" in whole, linear(tokens, width, outputs))
    for layer in ("img_mlp.0", "img_mlp.2"):
        _add(parts, "token_groups", layer in whole, linear(1, width, hidden))
    return BlockCost(**parts)


def flux_single(geometry: Geometry, whole: frozenset[str] = frozenset()) -> BlockCost:
    """A skipped image token is a key and a value only: no query, attention row, MLP or output columns.

    Where the fused first layer cannot be cut ("linear1" in `whole`) it runs whole on every token; where "linear2"
    cannot, it runs at full width.
    """
    width, hidden, text = geometry.width, geometry.hidden, geometry.text_tokens
    parts = {"fixed": linear(1, width, 3 * width), "heads": text * attention(1, geometry.tokens, width),
             "token_heads": attention(1, geometry.tokens, width)}
    if "linear1" in whole:
        parts["fixed"] += linear(geometry.tokens, width, 3 * width + hidden)
    else:
        parts["heads"] += linear(geometry.tokens, width, 2 * width)
        for unit, outputs in (("heads", width), ("groups", hidden)):
            _add(parts, unit, False, linear(text, width, outputs))
            _add(parts, f"token_{unit}", False, linear(1, width, outputs))
    for unit, inputs in (("heads", width), ("groups", hidden)):
        _add(parts, unit, "linear2" in whole, linear(text, inputs, width))
        _add(parts, f"token_{unit}", "linear2" in whole, linear(1, inputs, width))
    return BlockCost(**parts)


def flux_double_low_rank(geometry: Geometry, ranks: Mapping[str, int]) -> BlockCost:
    """Low-rank additions x ↦ x downᵀ upᵀ to a double block's layers; cut like the layers they are added to."""
    width, hidden = geometry.width, geometry.hidden
    parts = {"fixed": 0.0}
    for stream, tokens in (("img", geometry.image_tokens), ("txt", geometry.text_tokens)):
        _low_rank(parts, ranks.get(f"{stream}_attn.qkv", 0), tokens, ("fixed", width), ("heads", 3 * width))
        _low_rank(parts, ranks.get(f"{stream}_attn.proj", 0), tokens, ("heads", width), ("fixed", width))
    for stream, tokens, unit, groups in (("img", 1, "token", "token_groups"), ("txt", geometry.text_tokens, "fixed", "fixed")):
        _low_rank(parts, ranks.get(f"{stream}_mlp.0", 0), tokens, (unit, width), (groups, hidden))
        _low_rank(parts, ranks.get(f"{stream}_mlp.2", 0), tokens, (groups, hidden), (unit, width))
    return BlockCost(**parts)


def flux_single_low_rank(geometry: Geometry, ranks: Mapping[str, int]) -> BlockCost:
    """The same for a single block: linear1 makes keys and values of all tokens, the rest of text and kept tokens."""
    width, hidden, text = geometry.width, geometry.hidden, geometry.text_tokens
    parts = {"fixed": 0.0}
    rank1, rank2 = ranks.get("linear1", 0), ranks.get("linear2", 0)
    _low_rank(parts, rank1, geometry.tokens, ("fixed", width), ("heads", 2 * width))
    for prefix, fixed, tokens in (("", "fixed", text), ("token_", "token", 1)):
        _low_rank(parts, rank1, tokens, (fixed, width), (f"{prefix}heads", width))
        _low_rank(parts, rank1, tokens, (fixed, width), (f"{prefix}groups", hidden))
        _low_rank(parts, rank2, tokens, (f"{prefix}heads", width), (fixed, width))
        _low_rank(parts, rank2, tokens, (f"{prefix}groups", hidden), (fixed, 0))
    return BlockCost(**parts)


def dit_block(geometry: Geometry, seen: int, whole: frozenset[str] = frozenset()) -> BlockCost:
    """Every token is a query, and sees `seen` keys; skipping one saves its two MLP products. `whole` as of `flux_double`."""
    width, hidden, tokens = geometry.width, geometry.hidden, geometry.image_tokens
    parts = {"fixed": linear(1, width, 6 * width), "heads": attention(tokens, seen, width)}
    for layer, outputs in (("attn.qkv", 3 * width), ("attn.proj", width)):
        _add(parts, "heads", layer in whole, linear(tokens, width, outputs))
    for layer in ("mlp.fc1", "mlp.fc2"):
        _add(parts, "token_groups", layer in whole, linear(1, width, hidden))
    return BlockCost(**parts)


def dit_block_low_rank(geometry: Geometry, ranks: Mapping[str, int]) -> BlockCost:
    """The same for a DiT block."""
    width, hidden, tokens = geometry.width, geometry.hidden, geometry.image_tokens
    parts = {"fixed": 0.0}
    _low_rank(parts, ranks.get("attn.qkv", 0), tokens, ("fixed", width), ("heads", 3 * width))
    _low_rank(parts, ranks.get("attn.proj", 0), tokens, ("heads", width), ("fixed", width))
    _low_rank(parts, ranks.get("mlp.fc1", 0), 1, ("token", width), ("token_groups", hidden))
    _low_rank(parts, ranks.get("mlp.fc2", 0), 1, ("token_groups", hidden), ("token", width))
    return BlockCost(**parts)


def _low_rank(parts: dict[str, float], rank: int, tokens: float, inputs: tuple[str, int], outputs: tuple[str, int]) -> None:
    """`inputs` and `outputs`: what each product is proportional to, and its channels."""
    for unit, channels in (inputs, outputs):
        parts[unit] = parts.get(unit, 0.0) + linear(tokens, channels, rank)


def _add(parts: dict[str, float], unit: str, whole: bool, flops: float) -> None:
    """A layer that runs whole costs the same at every width."""
    unit = {"token_heads": "token", "token_groups": "token"}.get(unit, "fixed") if whole else unit
    parts[unit] = parts.get(unit, 0.0) + flops
