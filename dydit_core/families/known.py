"""The families that can run in parts: the one place that lists them."""

from __future__ import annotations

from torch import nn

from ..blocks import Family
from .dit import DiTFamily
from .flux import FluxFamily
from .latte import LatteFamily

# Latte before DiT: it has all that a DiT has, and frames.
FAMILIES: tuple[Family, ...] = FluxFamily(), LatteFamily(), DiTFamily()


def family_of(model: nn.Module) -> Family:
    """The family of `model`, found by how it is built. Raises ValueError: one sentence on why it is not of the nearest one."""
    reason = f"{type(model).__name__} is none of {', '.join(family.name for family in FAMILIES)}"
    for family in FAMILIES:
        if hasattr(model, family.stack):
            reason = family.refusal(model)
            if reason is None:
                return family
    raise ValueError(reason)
