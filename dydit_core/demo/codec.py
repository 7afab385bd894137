"""The demo's analytic encoder: every 8 × 8 patch of a picture projected on 16 principal directions.

Nothing is learned by gradient, so the base model can start training minutes after the first picture is drawn.
The directions are mixed by a Hadamard rotation that gives all 16 latent channels the same spread; diffusion
then treats them alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PATCH = 8
CHANNELS = 16
PATCH_DIM = 3 * PATCH * PATCH


@dataclass(frozen=True)
class PatchCodec:
    """latent = (patch − mean) @ encode; patch ≈ latent @ decode + mean. Patches are RGB in 0…1, channel first."""

    mean: Tensor  # [192]
    encode: Tensor  # [192, 16]
    decode: Tensor  # [16, 192]

    def to_latent(self, images: Tensor) -> Tensor:
        """Images [rows, 3, H, W] in 0…1 to latents [rows, 16, H/8, W/8] with unit spread per channel."""
        return ((to_patches(images) - self.mean) @ self.encode).permute(0, 3, 1, 2)

    def to_image(self, latent: Tensor) -> Tensor:
        """The linear inverse of `to_latent`: quick and a little blurred; the learned decoder does better."""
        return from_patches(latent.permute(0, 2, 3, 1) @ self.decode + self.mean)

    def state(self) -> dict[str, Tensor]:
        return {"mean": self.mean, "encode": self.encode.contiguous(), "decode": self.decode.contiguous()}


def to_patches(images: Tensor) -> Tensor:
    """[rows, 3, H, W] to [rows, H/8, W/8, 192]."""
    rows, _, height, width = images.shape
    x = images.view(rows, 3, height // PATCH, PATCH, width // PATCH, PATCH)
    return x.permute(0, 2, 4, 1, 3, 5).reshape(rows, height // PATCH, width // PATCH, PATCH_DIM)


def from_patches(patches: Tensor) -> Tensor:
    """Inverse of `to_patches`."""
    rows, height, width, _ = patches.shape
    x = patches.view(rows, height, width, 3, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
    return x.reshape(rows, 3, height * PATCH, width * PATCH)


def fit_codec(images: Tensor, channels: int = CHANNELS) -> PatchCodec:
    """The first principal directions of the patches of `images` [rows, 3, H, W] in 0…1.

    A direction of standard deviation s is scaled to √s: full whitening would spend the model's capacity on
    hardly visible directions, none would leave them as noise.
    """
    flat = to_patches(images).reshape(-1, PATCH_DIM)
    mean = flat.mean(0)
    centered = flat - mean
    variance, directions = torch.linalg.eigh(centered.T @ centered / len(flat))
    spread = variance.flip(0)[:channels].sqrt()
    directions = directions.flip(1)[:, :channels]
    scale = spread.rsqrt()
    scale = scale * (spread * scale).pow(2).mean().rsqrt()
    rotation = _hadamard(channels)
    return PatchCodec(mean, (directions * scale) @ rotation.T, rotation @ (directions / scale).T)


def _hadamard(size: int) -> Tensor:
    """Orthogonal [size, size] matrix of ± 1/√size; `size` is a power of two."""
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)], 0)
    return matrix / size**0.5
