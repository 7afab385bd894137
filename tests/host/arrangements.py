"""What else artists put on the graph of a tiny FLUX, made with the host's own nodes and loaders where it has them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass, field
from functools import cache, partial, wraps
from typing import Any
from unittest.mock import patch

import torch
from tiny import CONTEXT, DOUBLE, POOLED, SIDE, SINGLE, TEXT, IMAGE, WIDTH, blocks, flux, flux_file, load_flux, prompt  # first: starts the host

import comfy.context_windows
import comfy.hooks
import comfy.ldm.flux.controlnet
import comfy.ops
import comfy.sd
from comfy.controlnet import ControlNet
from comfy.ldm.flux.layers import DoubleStreamBlock
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfy_api.latest import io
from safetensors.torch import load_file
from torch import Tensor

LORA = ("double_blocks.0.img_mlp.0", "double_blocks.0.img_attn.qkv", "double_blocks.0.txt_attn.proj", "single_blocks.0.linear1",
        "single_blocks.1.linear2")


@dataclass(frozen=True)
class Graph:
    """A MODEL and what its sampler is given; both runs of a comparison are made inside `under`."""

    model: ModelPatcher
    run: dict[str, Any] = field(default_factory=dict)
    under: Callable[[], AbstractContextManager] = nullcontext


def after(node: type[io.ComfyNode], *inputs: Any) -> Graph:
    """The shared model after one of the host's nodes."""
    return Graph(node.execute(flux(), *inputs).result[0])


def noise(*shape: int, seed: int = 2) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@cache
def lora_file(seed: int = 9) -> dict[str, Tensor]:
    """A LoRA file of rank 4, on an MLP, attention and both fused layers."""
    tensors, shapes = {}, {name: flux().model.diffusion_model.get_submodule(name) for name in LORA}
    for place, (name, layer) in enumerate(shapes.items()):
        tensors[f"diffusion_model.{name}.lora_up.weight"] = 0.1 * noise(layer.out_features, 4, seed=seed + 2 * place)
        tensors[f"diffusion_model.{name}.lora_down.weight"] = 0.1 * noise(4, layer.in_features, seed=seed + 2 * place + 1)
    return tensors


def with_lora(model: ModelPatcher, strength: float = 1.0, seed: int = 9) -> ModelPatcher:
    return comfy.sd.load_lora_for_models(model, None, lora_file(seed), strength, 0)[0]


def with_bypass_lora(model: ModelPatcher) -> ModelPatcher:
    return comfy.sd.load_bypass_lora_for_models(model, None, lora_file(), 1.0, 0)[0]


@contextmanager
def nothing_fits() -> Iterator[None]:
    """Every layer is left out of memory, as on a card that is too small: LoRAs are then applied at each use."""
    load = ModelPatcher.load

    def low(self: ModelPatcher, device: object = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False,
            full_load: bool = False) -> None:
        load(self, device, 1, force_patch_weights, False)

    with patch.object(ModelPatcher, "load", low):
        yield


def scheduled_lora() -> Graph:
    """Create Hook LoRA with keyframes: the weights change between steps."""
    hooks, keyframes = comfy.hooks.create_hook_lora(lora_file(), 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.2, 0.0), (1.0, 0.4)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    return Graph(flux(), {"cfg": 3.0, "positive": comfy.hooks.set_hooks_for_conditioning(prompt(1), hooks)})


def quantised(format: str) -> ModelPatcher:
    """A file with weights packed as `format`, one of the host's own."""
    tensors, layout = {}, QUANT_ALGOS[format]["comfy_tensor_layout"]
    for key, value in load_file(flux_file()).items():
        if key.startswith(("double_blocks", "single_blocks")) and key.endswith(".weight") and value.ndim == 2:
            packed = QuantizedTensor.from_float(value, layout, **({"scale": "recalculate"} if "float8" in format else {}))
            tensors |= {name: part.contiguous() for name, part in packed.state_dict(key).items()}
            tensors[key.replace(".weight", ".comfy_quant")] = torch.tensor(list(json.dumps({"format": format}).encode()), dtype=torch.uint8)
        else:
            tensors[key] = value
    return comfy.sd.load_diffusion_model_state_dict(tensors)


class PackedTensor(torch.Tensor):
    """Two numbers in a byte, and the shape of what they stand for, as GGUF nodes keep a weight."""

    def __new__(cls, packed: Tensor, scale: Tensor) -> PackedTensor:
        return packed.as_subclass(cls)

    def __init__(self, packed: Tensor, scale: Tensor) -> None:
        self.scale, self.tensor_shape = scale, torch.Size((packed.size(0), 2 * packed.size(1)))

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "tensor_shape", self.size())

    def to(self, *args: Any, **kwargs: Any) -> PackedTensor:
        return self

    clone = detach = to

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        data = self.as_subclass(Tensor)
        return ((torch.stack((data & 15, data >> 4), dim=-1).flatten(1).to(dtype) - 8) * self.scale.to(dtype))


class PackedLinear(comfy.ops.manual_cast.Linear):
    """As GGUF nodes' layer: unpacks its weight in its own forward, where the host's cast does not reach."""

    def forward_comfy_cast_weights(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight.unpacked(x.dtype), self.bias)


def packed_layers() -> ModelPatcher:
    model = load_flux()
    for block in blocks(model):
        for layer in [layer for layer in block.modules() if isinstance(layer, torch.nn.Linear)]:
            scale = layer.weight.abs().amax(1, keepdim=True) / 7
            values = (layer.weight / scale).round().to(torch.int16) + 8
            layer.__class__ = PackedLinear
            layer.weight = torch.nn.Parameter(PackedTensor((values[:, ::2] | values[:, 1::2] << 4).to(torch.uint8), scale), requires_grad=False)
    return model


class _Identity:
    """A VAE that takes a latent for a picture, and gives it back."""

    def spacial_compression_encode(self) -> int:
        return 1

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels.movedim(-1, 1)


@cache
def controlnet() -> ControlNet:
    torch.manual_seed(11)
    shape = dict(in_channels=16, out_channels=16, vec_in_dim=POOLED, context_in_dim=CONTEXT, hidden_size=WIDTH, mlp_ratio=4.0, num_heads=2,
                 depth=1, depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False,
                 txt_ids_dims=[])
    model = comfy.ldm.flux.controlnet.ControlNetFlux(latent_input=True, control_latent_channels=16, operations=comfy.ops.manual_cast,
                                                     dtype=torch.float32, **shape)
    for name, value in model.named_parameters():
        torch.nn.init.normal_(value.requires_grad_(False), std=0.03) if "norm" not in name else torch.nn.init.ones_(value.requires_grad_(False))
    return ControlNet(model, compression_ratio=1, latent_format=comfy.latent_formats.Flux(), load_device=torch.device("cpu"), extra_conds=["y"])


def controlled() -> Graph:
    """Apply ControlNet, on both prompts, for the first part of sampling."""
    control = controlnet().copy().set_cond_hint(noise(1, 16, SIDE, SIDE), 1.0, (0.0, 0.7), vae=_Identity())
    control.latent_format = comfy.latent_formats.Flux()
    with_control = {"control": control, "control_apply_to_uncond": False}
    return Graph(flux(), {"cfg": 3.0, "batch": 2, "positive": prompt(1, **with_control), "negative": prompt(2, **with_control)})


def references(method: str) -> Graph:
    return Graph(flux(), {"positive": prompt(1, reference_latents=[noise(1, 16, 12, 8)], reference_latents_method=method)})


def regional_mask() -> Graph:
    """One prompt for each half, as an attention mask over all tokens."""
    tokens = TEXT + IMAGE
    return Graph(flux(), {"batch": 2, "positive": prompt(1, attention_mask=2 * noise(2, tokens, tokens), attention_mask_img_shape=(8, 8))})


def masked_prompts() -> Graph:
    """Conditioning (Set Mask): two prompts, each for a half of the picture."""
    left = torch.zeros(1, SIDE, SIDE)
    left[..., : SIDE // 2] = 1
    return Graph(flux(), {"positive": [*prompt(1, mask=left, mask_strength=1.0), *prompt(3, mask=1 - left, mask_strength=1.0)]})


def inpainted() -> dict[str, Tensor]:
    mask = torch.zeros(1, 1, SIDE, SIDE)
    mask[..., 4:12, 4:12] = torch.linspace(0.2, 1, 8)
    return {"noise_mask": mask}


def sharper_attention() -> Graph:
    """Another pack's attention (sage, flash, block-sparse): it gets every call and here passes it on, sharper."""
    model = flux().clone()

    def override(function: Callable, q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return function(2 * q, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return Graph(model)


def block_replaced() -> Graph:
    """As IP-Adapter and PuLID nodes do: run the block, then add to what it gives."""
    model = flux().clone()

    def adding(args: dict, extra: dict) -> dict:
        out = extra["original_block"](args)
        return {**out, "img": out["img"] + 0.3 * noise(*out["img"].shape[1:])}

    for kind, count in (("double_block", DOUBLE), ("single_block", SINGLE)):
        for index in range(count):
            model.set_model_patch_replace(adding, "dit", kind, index)
    return Graph(model)


def patched(name: str) -> Graph:
    """As FLUX KV Cache, NAG, USO and older IP-Adapters do."""
    model = flux().clone()
    model.set_model_patch(lambda *args, **kwargs: args[0], name)
    return Graph(model)


def patched_by_a_hook() -> Graph:
    hooks = comfy.hooks.HookGroup()
    hooks.add(comfy.hooks.TransformerOptionsHook({"patches": {"attn1_output_patch": [lambda attn, extra: attn]}},
                                                 hook_scope=comfy.hooks.EnumHookScope.HookedOnly))
    return Graph(flux(), {"positive": comfy.hooks.set_hooks_for_conditioning(prompt(1), hooks)})


def with_forward(path: str) -> Graph:
    """Another node's object patch on the forward of a module."""
    model, key = flux().clone(), f"diffusion_model.{path}.forward"
    forward = model.get_model_object(key)
    model.add_object_patch(key, partial(lambda x, *args, **kwargs: 1.5 * forward(x, *args, **kwargs)))
    return Graph(model)


def of_another_class() -> Graph:
    """As XLabs' nodes do: a block of their own class in the place of the host's, with the same parts."""
    class PackBlock(DoubleStreamBlock):
        def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            return super().forward(*args, **kwargs)

    block = copy(blocks(flux())[0])
    block.__class__ = PackBlock
    model = flux().clone()
    model.add_object_patch("diffusion_model.double_blocks.0", block)
    return Graph(model)


def class_patched() -> Graph:
    """Another pack patched the host's class itself, for every model."""
    forward = DoubleStreamBlock.forward

    @wraps(forward)
    def other(self: DoubleStreamBlock, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return forward(self, *args, **kwargs)

    return Graph(flux(), under=lambda: patch.object(DoubleStreamBlock, "forward", other))


def on_two_cards() -> Graph:
    """MultiGPU CFG Split on a machine with two: the node leaves a clone of the model for each further card."""
    model = flux().clone()
    model.set_additional_models("multigpu", [flux().clone()])
    return Graph(model)


class ComfyFluxWrapper(torch.nn.Module):
    """The transformer that nunchaku's loader puts in the model: FLUX inside, behind a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.model = torch.nn.Identity()


def of_another_loader() -> Graph:
    model = load_flux()
    model.model.diffusion_model = ComfyFluxWrapper()
    return Graph(model)
