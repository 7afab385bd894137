"""The demos' VAE files: exactly the layout of a TAESD, so ComfyUI's own VAE loader takes them.

With 16 channels (FLUX) the encoder is the patch codec, spelled in 3 × 3 convolutions; with 4 (DiT, SiT) it is learned.
Decoders are learned. What is learned is narrower than a TAESD and padded with zeros, and the residual blocks it does
not use are zero, which makes them the identity.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..storage import write_atomically
from .codec import CHANNELS, PATCH, PatchCodec, to_patches

# ComfyUI's FLUX latents are (z / SCALE) + SHIFT for the z that the transformer sees; those of Stable Diffusion have no shift.
FLUX_SCALE, FLUX_SHIFT = 0.3611, 0.1159
SD_SCALE = 0.18215
# TAESD squashes latents with 3·tanh(x/3); ours reach ±8, a third of that stays in the straight part.
SQUASH = 1 / 3
TAESD_WIDTH = 64
WIDTHS = {"deep": 64, "quarter": 48, "half": 32, "full": 16}
ENCODER_BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)
DECODER_BLOCKS = (3, 4, 5, 8, 9, 10, 13, 14, 15, 18)
# Keeps encoder activations positive through the ReLUs of the unused blocks; latents of pictures stay above -OFFSET.
OFFSET = 20.0


def _conv(inputs: int, outputs: int, bias: bool = True, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


class Block(nn.Module):
    """TAESD's residual block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        layers = [_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width)]
        self.conv = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


class Encoder(nn.Module):
    """Images [rows, 3, 8H, 8W] in 0…1 to latents [rows, channels, H, W] as the transformer sees them.

    The names of the parts are the indices of TAESD's encoder.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        deep, quarter, half, full = WIDTHS.values()
        self.layers = nn.ModuleDict({
            "0": _conv(3, full), "1": Block(full), "2": _conv(full, half, bias=False, stride=2), "3": Block(half),
            "6": _conv(half, quarter, bias=False, stride=2), "7": Block(quarter), "8": Block(quarter),
            "10": _conv(quarter, deep, bias=False, stride=2), "11": Block(deep), "12": Block(deep), "14": _conv(deep, channels),
        })

    def forward(self, images: Tensor) -> Tensor:
        for layer in self.layers.values():
            images = layer(images)
        return images / SQUASH


class Decoder(nn.Module):
    """Latents [rows, channels, H, W] as the transformer sees them to images [rows, 3, 8H, 8W], about 0…1.

    The names of the parts are the indices of TAESD's decoder.
    """

    def __init__(self, channels: int = CHANNELS) -> None:
        super().__init__()
        deep, quarter, half, full = WIDTHS.values()
        self.layers = nn.ModuleDict({
            "1": _conv(channels, deep), "3": Block(deep), "4": Block(deep),
            "7": _conv(deep, quarter, bias=False), "8": Block(quarter), "9": Block(quarter),
            "12": _conv(quarter, half, bias=False), "13": Block(half),
            "17": _conv(half, full, bias=False), "18": Block(full), "19": _conv(full, 3),
        })

    def forward(self, latent: Tensor) -> Tensor:
        x = torch.tanh(latent * SQUASH / 3) * 3
        for name, layer in self.layers.items():
            if name in ("7", "12", "17"):
                x = F.interpolate(x, scale_factor=2)
            x = layer(x)
            if name == "1":
                x = F.relu(x)
        return x


@torch.no_grad()
def decode(latent: Tensor, decoder: Decoder) -> Tensor:
    """Images [rows, 3, 8H, 8W] in 0…1 of model-space latents [rows, channels, H, W], eight rows at a time."""
    return torch.cat([decoder(rows.float()).clamp(0, 1) for rows in latent.split(8)])


def load_decoder(path: Path) -> Decoder:
    """The learned decoder out of a VAE file of this module's."""
    tensors = load_file(path)
    return _unpadded(Decoder(tensors["taesd_decoder.1.weight"].shape[1]), "taesd_decoder", tensors)


def load_learned_encoder(path: Path) -> Encoder:
    """The encoder out of a file that `export_learned_vae` wrote."""
    tensors = load_file(path)
    return _unpadded(Encoder(tensors["taesd_encoder.14.weight"].shape[0]), "taesd_encoder", tensors)


_Part = TypeVar("_Part", Encoder, Decoder)


def _unpadded(part: _Part, side: str, tensors: dict[str, Tensor]) -> _Part:
    own = {}
    for key, parameter in part.state_dict().items():
        padded = tensors[key.replace("layers", side, 1)].float()
        own[key] = padded[tuple(slice(0, size) for size in parameter.shape)]
    part.load_state_dict(own)
    return part.eval().requires_grad_(False)


def load_encoder(path: Path) -> Callable[[Tensor], Tensor]:
    """The patch projection out of the same file: images [rows, 3, 8H, 8W] in 0…1 to latents as the transformer sees them."""
    tensors = {key: value.float() for key, value in load_file(path).items()}
    project, one = tensors["taesd_encoder.10.weight"], TAESD_WIDTH - 1
    places = [where_pixel_goes(pixel) for pixel in range(3 * PATCH * PATCH)]
    encode = torch.stack([project[:CHANNELS, channel, 1 + row, 1 + column] for channel, (row, column) in places])
    offset = project[:CHANNELS, one, 1, 1] + tensors["taesd_encoder.14.bias"][:CHANNELS] / tensors["taesd_encoder.14.weight"][0, 0, 1, 1]
    return lambda images: (to_patches(images) @ encode + offset).permute(0, 3, 1, 2)


def export_vae(codec: PatchCodec, decoder: Decoder, target: Path) -> None:
    """Write encoder, decoder and FLUX's latent scale as one half-precision file of about 5 MB."""
    _write({**encoder_tensors(codec), **padded_tensors(decoder, "taesd_decoder")}, FLUX_SCALE, FLUX_SHIFT, target)


def export_learned_vae(encoder: Encoder, decoder: Decoder, target: Path) -> None:
    """Write both and Stable Diffusion's latent scale as one half-precision file of about 5 MB."""
    tensors = {**padded_tensors(encoder, "taesd_encoder"), **padded_tensors(decoder, "taesd_decoder")}
    _write(tensors, SD_SCALE, 0.0, target)


def _write(tensors: dict[str, Tensor], scale: float, shift: float, target: Path) -> None:
    half = {key: value.half().contiguous() for key, value in tensors.items()}
    # In half precision the scale would be off by a part in ten thousand of every latent.
    half["vae_scale"] = torch.tensor(scale * SQUASH)
    half["vae_shift"] = torch.tensor(shift)
    write_atomically(target, lambda partial: save_file(half, partial))


def padded_tensors(part: Encoder | Decoder, side: str) -> dict[str, Tensor]:
    """A learned half under TAESD's keys and in TAESD's shapes."""
    entry, last = ("0", "14") if side == "taesd_encoder" else ("1", "19")
    tensors = _identity_blocks(side, ENCODER_BLOCKS if side == "taesd_encoder" else DECODER_BLOCKS)
    for key, value in part.state_dict().items():
        layer = key.split(".")[1]
        shape = [value.shape[0] if layer == last else TAESD_WIDTH]
        if value.ndim == 4:
            shape += [value.shape[1] if layer == entry else TAESD_WIDTH, 3, 3]
        padded = torch.zeros(shape)
        padded[tuple(slice(0, size) for size in value.shape)] = value.float()
        tensors[key.replace("layers", side, 1)] = padded
    return tensors


def encoder_tensors(codec: PatchCodec) -> dict[str, Tensor]:
    """The patch projection as TAESD's encoder: three stride-2 layers sort pixels into channels, the last projects.

    The stride-2 layers have no bias, so one channel carries the constant 1 through all of them.
    """
    one = TAESD_WIDTH - 1
    tensors = _identity_blocks("taesd_encoder", ENCODER_BLOCKS)
    entry, bias = torch.zeros(TAESD_WIDTH, 3, 3, 3), torch.zeros(TAESD_WIDTH)
    entry[range(3), range(3), 1, 1] = 1
    bias[one] = 1
    tensors["taesd_encoder.0.weight"], tensors["taesd_encoder.0.bias"] = entry, bias
    tensors["taesd_encoder.2.weight"] = sort_pixels(3)
    tensors["taesd_encoder.6.weight"] = sort_pixels(12)
    project = torch.zeros(TAESD_WIDTH, TAESD_WIDTH, 3, 3)
    for pixel in range(3 * PATCH * PATCH):
        channel, tap = where_pixel_goes(pixel)
        project[:CHANNELS, channel, 1 + tap[0], 1 + tap[1]] = codec.encode[pixel]
    constant = (OFFSET - codec.mean @ codec.encode).half().float()
    project[:CHANNELS, one, 1, 1] = constant
    tensors["taesd_encoder.10.weight"] = project
    out = torch.zeros(CHANNELS, TAESD_WIDTH, 3, 3)
    out[range(CHANNELS), range(CHANNELS), 1, 1] = SQUASH
    tensors["taesd_encoder.14.weight"] = out
    # What rounding took from the constant, and from SQUASH, is given back here.
    gain = torch.tensor(SQUASH).half().float()
    tensors["taesd_encoder.14.bias"] = -gain * (constant + codec.mean @ codec.encode)
    return tensors


def _identity_blocks(side: str, indices: tuple[int, ...]) -> dict[str, Tensor]:
    tensors = {}
    for index in indices:
        for layer in (0, 2, 4):
            tensors[f"{side}.{index}.conv.{layer}.weight"] = torch.zeros(TAESD_WIDTH, TAESD_WIDTH, 3, 3)
            tensors[f"{side}.{index}.conv.{layer}.bias"] = torch.zeros(TAESD_WIDTH)
    return tensors


def sort_pixels(channels: int) -> Tensor:
    """Stride-2 weights [64, 64, 3, 3]: channel c of the 2 × 2 pixels goes to channels 4c … 4c + 3."""
    weight = torch.zeros(TAESD_WIDTH, TAESD_WIDTH, 3, 3)
    for channel in range(channels):
        for row in range(2):
            for column in range(2):
                weight[4 * channel + 2 * row + column, channel, 1 + row, 1 + column] = 1
    weight[TAESD_WIDTH - 1, TAESD_WIDTH - 1, 1, 1] = 1
    return weight


def where_pixel_goes(pixel: int) -> tuple[int, tuple[int, int]]:
    """Channel and (row, column) tap of the third stride-2 layer that sees pixel number `pixel` of a patch."""
    color, row, column = pixel // 64, pixel // 8 % 8, pixel % 8
    first = 2 * (row & 1) + (column & 1)
    second = 2 * (row >> 1 & 1) + (column >> 1 & 1)
    return (4 * color + first) * 4 + second, (row >> 2, column >> 2)
