"""The frozen base of a training, out of any file in FLUX's own layout: checked from its header, then loaded as it is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.files import bad, opened
from ..lora import DOWN, PREFIX, UP, load_lora, merge
from ..models.flux import Flux, FluxConfig, config_from_state_dict, from_file_key, to_file_key
from ..sampling import sigmas
from .casting import CastBackend, CastOperations
from .recompute import Recomputed
from .teacher import Teacher, flux_teacher

PRECISIONS = {"bf16": torch.bfloat16, "fp32": torch.float32}
# As safetensors call them.
TYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
# What ComfyUI's "simple" schedule gives models with a guidance input (FLUX.1-dev), and those without (schnell).
GUIDED_SHIFT, PLAIN_SHIFT = math.exp(1.15), 1.0
_BUNDLE = "model.diffusion_model."
_ANOTHER = "choose a FLUX.1 in the layout of ComfyUI's models/diffusion_models"


@dataclass(frozen=True)
class BaseFile:
    """The header of a base: `names` in the file and `types` (see `TYPES`) by the model's own parameter names."""

    path: Path
    config: FluxConfig
    names: Mapping[str, str]
    types: Mapping[str, str]


def read_base(path: Path) -> BaseFile:
    """Raises FileError for what is no FLUX of this layout; reads no tensor."""
    with opened(path, "choose the .safetensors of the model", "give --base the file of a FLUX, or the word demo") as file:
        found = {key: file.get_slice(key) for key in file.keys()}
        # A checkpoint with text encoders and VAE holds the model under this.
        prefix = _BUNDLE if any(key.startswith(_BUNDLE) for key in found) else ""
        parts = {from_file_key(key[len(prefix) :]): key for key in found if key.startswith(prefix)}
        shapes = {name: tuple(found[key].get_shape()) for name, key in parts.items()}
        types = {name: found[key].get_dtype() for name, key in parts.items()}
    try:
        config = config_from_state_dict(shapes)
        expected = {name: tuple(value.shape) for name, value in empty_model(config).state_dict().items()}
    except (ValueError, IndexError) as error:
        raise bad(path, f"does not fit ({str(error).rstrip('.')})", _ANOTHER) from None
    for name, shape in expected.items():
        if shapes.get(name) != shape:
            found_shape = shapes.get(name, "none")
            raise bad(path, f"has {to_file_key(name)} of size {found_shape} where a FLUX of its width has {shape}", _ANOTHER)
        if types[name] not in TYPES:
            raise bad(path, f"has {to_file_key(name)} in {types[name]}", "choose the file in bf16, fp16 or plain fp8")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise bad(path, f"has more than a FLUX has ({extra[0]})",
                  "choose the file in bf16, fp16 or plain fp8, without scales, gates or LoRAs in it")
    return BaseFile(path, config, parts, types)


def empty_model(config: FluxConfig) -> Flux:
    """Without numbers. Raises ValueError for a width that has no whole heads."""
    with torch.device("meta"):
        return Flux(config, CastOperations).eval().requires_grad_(False)


def held_type(name: str, tensor: Tensor, stored: torch.dtype, precision: torch.dtype) -> torch.dtype:
    """What parameter `name` is held in: the matrices of the blocks as they are `stored`, the little else in `precision`."""
    return stored if "blocks." in name and tensor.ndim == 2 else precision


def load_base(base: BaseFile, device: torch.device, precision: torch.dtype) -> Flux:
    model, tensors = empty_model(base.config), {}
    with opened(base.path, "", "") as file:
        for name, empty in model.state_dict().items():
            tensor = file.get_tensor(base.names[name])
            tensors[name] = tensor.to(device, held_type(name, empty, tensor.dtype, precision))
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def add_lora(model: Flux, path: Path) -> None:
    """Merge the LoRA in `path` into `model`. Raises FileError."""
    remedy = "merge it into the base first, or train with the DyDiT Train node, which takes any LoRA"
    with opened(path, "choose the .safetensors of the LoRA", "give --lora the file of a LoRA") as file:
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}
    layers = dict(model.named_modules())
    for key in shapes:
        name, down, _ = key.removeprefix(PREFIX).partition(DOWN if key.endswith(DOWN) else UP)
        layer, pair = layers.get(name), (f"{PREFIX}{name}{DOWN}", f"{PREFIX}{name}{UP}")
        if not down or not key.startswith(PREFIX) or layer is None or not all(part in shapes for part in pair):
            raise bad(path, f"is a LoRA in another layout than --lora takes ({key[:80]})", remedy)
        if (shapes[pair[1]][0], shapes[pair[0]][1]) != tuple(layer.weight.shape):
            raise bad(path, f"has {name} in another size than this base", "choose a LoRA that was made for this base")
        if layer.weight.dtype.itemsize == 1:
            raise bad(path, "cannot be merged into fp8 weights without loss", "give --base the file in bf16 or fp16")
    merge(model, load_lora(path))


def teacher_of(model: Flux, precision: torch.dtype, shift: float, guidance: float, checkpointing: bool) -> Teacher:
    teacher = flux_teacher(model, guidance, partial(sigmas, shift=shift), precision)
    return replace(teacher, family=Recomputed(teacher.family) if checkpointing else teacher.family, backend=CastBackend())
