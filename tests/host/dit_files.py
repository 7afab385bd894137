"""Tiny DiT files in the host's models folder, with random routers that leave some of everything on and some off."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

import json
from pathlib import Path
from typing import Any

import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.checkpoints.dit_adapter import DiTAdapter
from dydit_pack.dydit_core.checkpoints.dit_keys import RouterSizes, router_shapes
from dydit_pack.dydit_core.models.dit import DiTConfig
from dydit_pack.nodes import folders
from dydit_pack.nodes.checkpoint import DyDiTCheckpointLoader
from safetensors.torch import save_file
from tiny import as_node
from tiny_dit import NAMES, network
from torch import Tensor

SIZES = RouterSizes(heads=4, groups=8, hidden=8)


def routers(shape: DiTConfig, sizes: RouterSizes = SIZES) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(4), {}
    for key, size in router_shapes(shape, sizes).items():
        spread = 1.0 if key.endswith("weight") and "mlp_head" in key else 0.5
        found[key] = spread * torch.randn(size, generator=generator)
    return found


@pytest.fixture(scope="module")
def models() -> Path:
    folders.register()  # as when the pack loads
    folder = Path(folder_paths.get_folder_paths("diffusion_models")[0])
    assert inside.BASE in folder.parents
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write(folder: Path, name: str, shape: DiTConfig, routed: bool = True, **facts: str) -> Path:
    tensors = dict(network(shape).state_dict()) | (routers(shape) if routed else {})
    save_file(tensors, folder / name, {"prediction": shape.prediction, "heads": str(shape.num_heads), "classes": json.dumps(NAMES), **facts})
    return folder / name


def load(path: Path, **inputs: Any) -> tuple[ModelPatcher, DiTAdapter | None]:
    values = {"guidance_channels": "all", "interpolate_positions": False, **inputs}
    return as_node(DyDiTCheckpointLoader).EXECUTE_NORMALIZED(checkpoint_name=path.name, **values).result
