"""The plain-torch `Backend`: what a family needs when no host is there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .models.flux import apply_rotary
from .blocks import Effective


class TorchBackend:
    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict | None) -> Tensor:
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]  # [rows, queries, keys], as in ComfyUI
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def rotate(self, x: Tensor, table: Tensor) -> Tensor:
        return apply_rotary(x, table)

    @contextmanager
    def weights(self, linear: nn.Module, x: Tensor) -> Iterator[Effective]:
        yield Effective(linear.weight, linear.bias)

    def device(self, linear: nn.Module) -> torch.device:
        return linear.weight.device

    def unsliceable(self, linear: nn.Module) -> str | None:
        return None
