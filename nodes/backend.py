"""How ComfyUI computes attention, rotary embeddings and effective weights, as a `blocks.Backend`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import comfy.ops
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from comfy.model_management import cast_to_device, get_torch_device
from comfy.quant_ops import QuantizedTensor
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..dydit_core.blocks import Effective

# One scale for the whole weight, and one number for each of its values: any rows and columns keep that scale.
_ONE_SCALE = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout")
# Both sides of a scaled product must be multiples of this.
_TILE = 16


class ComfyBackend:
    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict | None) -> Tensor:
        return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options)

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        return apply_rope1(x, table)

    @contextmanager
    def weights(self, linear: nn.Module, x: Tensor) -> Iterator[Effective]:
        weight, bias, offload = comfy.ops.cast_bias_weight(linear, x, offloadable=True, want_requant=_multiplies_scaled(linear))
        try:
            if isinstance(weight, QuantizedTensor):
                yield Effective(weight._qdata, bias, partial(_scaled_product, linear, weight))
            else:
                yield Effective(weight, bias)
        finally:
            comfy.ops.uncast_bias_weight(linear, weight, bias, offload)

    def device(self, linear: nn.Module) -> torch.device:
        """Weights that the host streams lie on the CPU, and there they would be used without their LoRAs."""
        return get_torch_device() if hasattr(linear, "_v") else linear.weight.device

    def unsliceable(self, linear: nn.Module) -> str | None:
        """Packed layers and those of other packs keep their own forward: what a row of their weight means is theirs to know."""
        if type(linear).__module__ != comfy.ops.__name__:
            return f"its layers are {type(linear).__name__} of {type(linear).__module__}, which only run whole"
        weight = linear.weight
        if isinstance(weight, QuantizedTensor) and (weight._layout_cls not in _ONE_SCALE or weight.params.scale.numel() != 1):
            return f"its weights are packed as {getattr(linear, 'quant_format', None) or weight._layout_cls}"
        if getattr(linear, "pre_quant_scale", None) is not None:
            return "its inputs are scaled one by one"
        if _overridden(linear) or linear._forward_hooks or linear._forward_pre_hooks:
            # A bypass LoRA adds to what the layer's forward gives; the weight alone would leave it out.
            return "another node works inside its layers"
        return None


def _overridden(module: nn.Module) -> bool:
    """A node put another forward on the module. When it is gone the host leaves the method there, as an attribute."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def _multiplies_scaled(linear: Any) -> bool:
    """The layer quantises its input and multiplies in fp8, as its own forward decides."""
    return (getattr(linear, "layout_type", None) is not None and not linear._full_precision_mm
            and not getattr(linear, "comfy_force_cast_weights", False) and not linear.weight_function and not linear.bias_function)


def _scaled_product(linear: Any, whole: QuantizedTensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` times rows and columns `weight` of the quantised data of `whole`, in fp8 where the layer and the shape allow it."""
    params = type(whole.params)(scale=whole.params.scale, orig_dtype=x.dtype, orig_shape=tuple(weight.shape))
    part = QuantizedTensor(weight, whole._layout_cls, params)
    if not _multiplies_scaled(linear) or any(size % _TILE for size in weight.shape):
        return F.linear(x, part.dequantize(), bias)
    scale = getattr(linear, "input_scale", None)
    scale = None if scale is None else cast_to_device(scale, x.device, None)
    quantised = QuantizedTensor.from_float(x.flatten(0, -2), linear.layout_type, scale=scale)
    return F.linear(quantised, part, bias).unflatten(0, x.shape[:-1])
