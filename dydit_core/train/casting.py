"""Weights that stay in the type of their file, down to fp8, and are cast where they are used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..backend import TorchBackend
from ..blocks import Effective


def working_type(x: Tensor) -> torch.dtype:
    """What a product with `x` is made in."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class CastLinear(nn.Linear):
    """A cast copy is kept for the backward pass: only gradient checkpointing (`recompute`) bounds what they take."""

    def cast(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        dtype = working_type(x)
        return self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(working_type(x)), *self.cast(x))


class CastRMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class CastOperations:
    """The layers for the `operations` of `models.flux.Flux`."""

    Linear, LayerNorm, RMSNorm = CastLinear, nn.LayerNorm, CastRMSNorm


class CastBackend(TorchBackend):
    """For a model of `CastOperations`."""

    @contextmanager
    def weights(self, linear: CastLinear, x: Tensor) -> Iterator[Effective]:
        yield Effective(*linear.cast(x))
