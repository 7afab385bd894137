"""How ComfyUI computes attention, rotary embeddings and effective weights, as a `parts.Backend`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import comfy.ops
import comfy.quant_ops
from comfy.ldm.flux.math import apply_rope1
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor, nn


class ComfyBackend:
    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict | None) -> Tensor:
        return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, mask=mask, transformer_options=options)

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        return apply_rope1(x, table)

    @contextmanager
    def weights(self, linear: nn.Module, x: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        weight, bias, offload = comfy.ops.cast_bias_weight(linear, x, offloadable=True)
        try:
            yield weight, bias
        finally:
            comfy.ops.uncast_bias_weight(linear, weight, bias, offload)

    def unsliceable(self, linear: nn.Module) -> str | None:
        """Quantised and packed layers keep their own forward: slicing them would unpack the whole weight."""
        if isinstance(linear.weight, comfy.quant_ops.QuantizedTensor):
            return "its weights are quantised"
        if not isinstance(linear, nn.Linear) or type(linear).__module__ != comfy.ops.__name__:
            # GGUF and other packs' layers: what their weight holds is theirs to know.
            return f"its layers are {type(linear).__name__} of {type(linear).__module__}, which only run whole"
        if "forward" in vars(linear) or linear._forward_hooks or linear._forward_pre_hooks:
            # A bypass LoRA adds to what the layer's forward gives; the weight alone would leave it out.
            return "another node works inside its layers"
        return None
