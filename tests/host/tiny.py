"""A tiny random FLUX in the host, and what the nodes and samplers of a graph do with it."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from dydit_pack.dydit_core.checkpoints.adapter import Adapter, Facts
from dydit_pack.dydit_core.families.flux import FluxFamily
from dydit_pack.dydit_core.models.flux import Flux, FluxConfig, to_file_key
from dydit_pack.dydit_core.routers.token import CapacityTable, TokenScores
from dydit_pack.dydit_core.routers.width import WidthScores
from dydit_pack.dydit_core.td_lora import TimestepLoRA
from dydit_pack.dydit_core.trace import Trace
from dydit_pack.nodes import events
from dydit_pack.nodes.budget import DyDiTBudget
from safetensors.torch import save_file
from torch import Tensor

WIDTH, DOUBLE, SINGLE, CONTEXT, POOLED = 256, 1, 2, 128, 64
SIDE, TEXT = 16, 12  # latent side (8 × 8 image tokens) and text tokens
BLOCKS = DOUBLE + SINGLE
IMAGE = (SIDE // 2) ** 2
GROUPS = 16  # channel groups of an MLP in `wide_adapter`


@cache
def flux_file() -> Path:
    """A file as Black Forest Labs release them (schnell: no guidance), with random weights that do something."""
    torch.manual_seed(7)
    model = Flux(FluxConfig(WIDTH, DOUBLE, SINGLE, context_in_dim=CONTEXT, vec_in_dim=POOLED))
    tensors = {}
    for key, value in model.state_dict().items():
        if "norm" in key:
            value = 1 + 0.1 * torch.randn_like(value)
        elif "mod" in key:
            value = 4 * value  # gates near 1, so that a wrong block is seen in the picture
        tensors[to_file_key(key)] = value.contiguous()
    path = inside.BASE / "flux.safetensors"
    save_file(tensors, path)
    return path


def load_flux(dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """The MODEL that the host's diffusion-model loader gives, with weights in `dtype`."""
    return comfy.sd.load_diffusion_model(str(flux_file()), model_options={"dtype": dtype})


@cache
def flux() -> ModelPatcher:
    """The fp32 MODEL that tests share; its module must be as it was after every test."""
    return load_flux()


def transformer(model: ModelPatcher) -> torch.nn.Module:
    return model.model.diffusion_model


def put_back(model: ModelPatcher) -> None:
    """The host puts a patched method back as an attribute of its module; take these away. Nothing else may be there."""
    for module in transformer(model).modules():
        forward = vars(module).pop("forward", None)
        assert forward is None or forward.__func__ is type(module).forward


def blocks(model: ModelPatcher) -> list[torch.nn.Module]:
    return [*transformer(model).double_blocks, *transformer(model).single_blocks]


def prompt(seed: int = 1, tokens: int = TEXT, **more: Any) -> list:
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(1, tokens, CONTEXT, generator=generator)
    pooled = torch.randn(1, POOLED, generator=generator)
    return [[context, {"pooled_output": pooled, **more}]]


def sample(model: ModelPatcher, steps: int = 4, cfg: float = 1.0, sampler: str = "euler", *, batch: int = 1, seed: int = 5,
           positive: list | None = None, negative: list | None = None, size: tuple[int, int] = (SIDE, SIDE),
           latent: Tensor | None = None, noisy: bool = False, **options: Any) -> Tensor:
    """What a KSampler does; `options` as of `comfy.sample.sample`. A `noisy` latent gets no more noise."""
    latent = torch.zeros(batch, 16, *size) if latent is None else latent
    noise = torch.zeros_like(latent) if noisy else comfy.sample.prepare_noise(latent, seed)
    positive, negative = positive or prompt(1), negative or prompt(2)
    return comfy.sample.sample(model, noise, steps, cfg, sampler, "simple", positive, negative, latent, disable_pbar=True,
                               seed=seed, **options)


def as_node(node: type[io.ComfyNode], unique_id: str = "5", workflow: str = "w") -> type[io.ComfyNode]:
    """The class clone on which the host calls `execute`, with the hidden inputs of one node of one workflow."""
    hidden = {io.Hidden.unique_id: unique_id, io.Hidden.extra_pnginfo: {"workflow": {"id": workflow}}}
    return node.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})


def budgeted(model: ModelPatcher, budget: float = 0.5, *, node: str = "5", **inputs: Any) -> ModelPatcher:
    """`model` after a DyDiT Budget node."""
    values = {"method": "auto", "substitute": "auto", "start_percent": 0.0, "end_percent": 1.0, "min_keep": 0.1,
              "branch_share": 1.0, **inputs}
    return as_node(DyDiTBudget, node).EXECUTE_NORMALIZED(model=model, budget=budget, **values).result[0]


def last_trace() -> Trace:
    """The newest run of the store."""
    return events.STORE.newest_first()[0]


def wide_adapter() -> Adapter:
    """Untrained too, with all that an adapter may have: token scores, widths and a TD-LoRA on every layer."""
    generator = torch.Generator().manual_seed(8)
    tokens, layers = adapter(), {}
    for index, block in enumerate(blocks(flux())):
        for name, layer in FluxFamily().layers(block).items():
            down = torch.randn(1, 3, layer.in_features, generator=generator) * layer.in_features**-0.5
            layers[index, name] = down, 0.1 * torch.randn(2, layer.out_features, 3, generator=generator)
    width = WidthScores(torch.randn(5, BLOCKS, WIDTH // 128, generator=generator), torch.randn(5, BLOCKS, GROUPS, generator=generator))
    low_rank = TimestepLoRA(layers, torch.randn(3, BLOCKS, 2, generator=generator))
    return replace(tokens, width=width.requires_grad_(False), low_rank=low_rank.requires_grad_(False))


def adapter(width: int = WIDTH, double: int = DOUBLE, single: int = SINGLE) -> Adapter:
    """An untrained router with a capacity table that differs by block and sigma."""
    generator = torch.Generator().manual_seed(3)
    total, bins, levels = double + single, 4, 9
    scores = TokenScores(total, width, 4).requires_grad_(False)
    for value in scores.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    quantiles = torch.randn(total, bins, levels, generator=generator).sort(-1).values
    return Adapter(Facts(double, single, width, "A router"), scores, CapacityTable(quantiles, torch.linspace(0.25, 1, bins)))
