"""Files laid out like the authors' release: diffusers' names under "module", with small random tensors."""

from __future__ import annotations

from pathlib import Path

import torch
from dydit_core.checkpoints.fit import Layout
from dydit_core.checkpoints.flux_keys import Sizes, router_keys, router_shapes, source_shapes
from torch import Tensor

RELEASED = Sizes(Layout(3072, 8, 38), patch=64, context=4096, pooled=768, embedding=256, head=128, hidden=12288, guidance=True)
SMALL = Sizes(Layout(16, 2, 3), patch=8, context=12, pooled=10, embedding=6, head=4, hidden=64, guidance=True)


def shapes(sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """Of every key of a released file."""
    routers = dict(zip(router_keys(sizes.layout, diffusers=True).values(), router_shapes(sizes.layout).values()))
    return source_shapes(sizes) | routers


def tensors(sizes: Sizes = SMALL, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes(sizes).items()}


def save(path: Path, found: dict[str, Tensor]) -> Path:
    torch.save({"module": found}, path)
    return path
