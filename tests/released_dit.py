"""Files laid out like those of the DiT, SiT and DyDiT authors, with small random tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from dydit_core.checkpoints.dit_keys import RouterSizes, base_shapes, router_shapes
from dydit_core.checkpoints.source import Entry, Source
from dydit_core.models.dit import DiTConfig
from torch import Tensor

XL, XL_ROUTERS = DiTConfig(), RouterSizes(heads=16, groups=16, hidden=72)
SMALL = DiTConfig(hidden_size=64, depth=2, num_heads=8, side=8, classes=10)
SMALL_ROUTERS = RouterSizes(heads=8, groups=8, hidden=4)


def shapes(config: DiTConfig = SMALL, routers: RouterSizes | None = SMALL_ROUTERS) -> dict[str, tuple[int, ...]]:
    return base_shapes(config) | (router_shapes(config, routers) if routers else {})


def source(config: DiTConfig, routers: RouterSizes | None = None, name: str = "a.safetensors", arguments: Mapping | None = None,
           **metadata: str) -> Source:
    """The header of a file that is not there."""
    entries = {key: Entry(key, "F32", shape) for key, shape in shapes(config, routers).items()}
    return Source(Path(name), entries, metadata, arguments=arguments or {})


def tensors(config: DiTConfig = SMALL, routers: RouterSizes | None = SMALL_ROUTERS, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator).to(dtype) for key, shape in shapes(config, routers).items()}


def december(sizes: RouterSizes) -> RouterSizes:
    """The layout of December 2024: an output for every unit."""
    return replace(sizes, always_on=False)
