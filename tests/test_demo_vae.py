from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dydit_core.demo.codec import PatchCodec, fit_codec, from_patches, to_patches
from dydit_core.demo.vae import FLUX_SCALE, SQUASH, Decoder, decode, encoder_tensors, export_vae, load_decoder

STRIDED = (2, 6, 10)
BLOCKS = (1, 3, 4, 5, 7, 8, 9, 11, 12, 13)


@pytest.fixture(scope="module")
def codec() -> PatchCodec:
    generator = torch.Generator().manual_seed(0)
    smooth = F.interpolate(torch.rand(4, 3, 9, 9, generator=generator), size=(64, 64), mode="bilinear")
    return fit_codec(smooth)


def run_taesd_encoder(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """TAESD's encoder, spelled out from its file."""
    for index in range(15):
        name = f"taesd_encoder.{index}"
        if index in BLOCKS:
            inner = x
            for layer in (0, 2, 4):
                inner = F.conv2d(inner, tensors[f"{name}.conv.{layer}.weight"], tensors[f"{name}.conv.{layer}.bias"], padding=1)
                inner = F.relu(inner) if layer < 4 else inner
            x = F.relu(inner + x)
        else:
            stride = 2 if index in STRIDED else 1
            x = F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), stride=stride, padding=1)
    return x


def test_taesd_layout_encodes_like_the_patch_projection(codec: PatchCodec) -> None:
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1))
    expected = codec.to_latent(images)
    found = run_taesd_encoder(encoder_tensors(codec), images) / SQUASH
    assert found.shape == (2, 16, 4, 6)
    # 20 / 2048: half-precision rounding of SQUASH, all that is left of it.
    assert (found - expected).abs().max() < 0.01


def test_patches_round_trip() -> None:
    images = torch.arange(2 * 3 * 16 * 24, dtype=torch.float32).view(2, 3, 16, 24)
    assert torch.equal(from_patches(to_patches(images)), images)


def test_latents_have_unit_spread(codec: PatchCodec) -> None:
    generator = torch.Generator().manual_seed(0)
    images = F.interpolate(torch.rand(4, 3, 9, 9, generator=generator), size=(64, 64), mode="bilinear")
    spread = codec.to_latent(images).std((0, 2, 3))
    assert (spread - 1).abs().max() < 0.35


def test_decoder_comes_back_from_its_file(codec: PatchCodec, tmp_path: Path) -> None:
    torch.manual_seed(0)
    decoder = Decoder()
    export_vae(codec, decoder, tmp_path / "vae" / "demo.safetensors")
    latent = torch.randn(1, 16, 4, 4)
    again = decode(latent, load_decoder(tmp_path / "vae" / "demo.safetensors"))
    assert again.shape == (1, 3, 32, 32)
    assert (again - decode(latent, decoder)).abs().max() < 2e-3
    assert (tmp_path / "vae" / "demo.safetensors").stat().st_size < 5.2e6
    assert FLUX_SCALE == 0.3611
