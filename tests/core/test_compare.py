"""PSNR, SSIM and the difference of pictures: known by hand, and as torchmetrics has them."""

from __future__ import annotations

import math

import pytest
import torch
from hosting import require_import
from torch import Tensor

from dydit_core.colours import cividis
from dydit_core.compare import WINDOW, decibels, difference, measure, pairs, psnr, refusal, ssim


def pictures(rows: int = 3, noise: float = 0.1, size: tuple[int, int] = (40, 33), seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two batches [rows, H, W, 3] in 0…1 that differ by noise, less in each row than in the one before."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(rows, *size, 3, generator=generator)
    strength = noise / torch.arange(1, rows + 1).view(-1, 1, 1, 1)
    return image, (image + strength * torch.randn(image.shape, generator=generator)).clamp(0, 1)


def channels_first(*batches: Tensor) -> list[Tensor]:
    return [batch.movedim(-1, 1) for batch in batches]


# --- by hand

@pytest.mark.parametrize("mse, expected", [(1.0, 0.0), (0.01, 20.0), (1e-4, 40.0), (0.0, math.inf)])
def test_decibels(mse: float, expected: float) -> None:
    assert decibels(mse) == pytest.approx(expected) and str(decibels(1.0)) == "0.0"


def test_one_known_offset() -> None:
    one = measure(torch.full((3, 16, 16), 0.5), torch.full((3, 16, 16), 0.6))
    assert decibels(one.mse) == pytest.approx(20, abs=1e-4) and one.largest == pytest.approx(0.1, abs=1e-6)
    # Without structure only the luminance term is left.
    assert one.ssim == pytest.approx((2 * 0.5 * 0.6 + 1e-4) / (0.25 + 0.36 + 1e-4), abs=1e-4)


def test_a_flat_picture_keeps_its_precision() -> None:
    """Differences of squares in float32 would give 0.9991 here."""
    exact = (2 * 0.9 * 0.901 + 1e-4) / (0.9**2 + 0.901**2 + 1e-4)
    assert ssim(torch.full((3, 24, 24), 0.9), torch.full((3, 24, 24), 0.901)) == pytest.approx(exact, abs=1e-6)


def test_the_negative_of_a_checkerboard_has_negative_structure() -> None:
    board = ((torch.arange(32)[:, None] + torch.arange(32)) % 2).float()[None]
    assert ssim(board, 1 - board) < -0.95 < 0.99 < ssim(board, board)


def test_psnr_pools_the_error_before_the_logarithm() -> None:
    reference = torch.zeros(2, 3, 16, 16)
    images = torch.stack([torch.full((3, 16, 16), 0.1), torch.full((3, 16, 16), 0.01)])
    pooled = psnr(images, reference)
    assert pooled == pytest.approx(10 * math.log10(2 / (0.01 + 0.0001)), abs=1e-3)
    assert (psnr(images[:1], reference[:1]) + psnr(images[1:], reference[1:])) / 2 == pytest.approx(30, abs=1e-3) != pooled


def test_psnr_where_a_pixel_counts() -> None:
    reference, images = torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    images[..., :2] = 0.1
    weight = torch.zeros(1, 1, 4, 4)
    weight[..., :2] = 1
    assert psnr(images, reference, weight) == pytest.approx(20, abs=1e-3) and psnr(images, reference, 1 - weight) == math.inf


def test_identical() -> None:
    for picture in (pictures()[0][0].movedim(-1, 0), torch.full((3, 20, 20), 0.7)):
        one = measure(picture, picture.clone())
        assert (one.mse, one.ssim, one.largest) == (0, 1, 0)


@pytest.mark.parametrize("offset, share", [
    ((0.0, 0.0, 0.0), 0.0), ((0.05, 0.05, 0.05), 0.5), ((0.0, -0.15, 0.0), 0.5), ((0.1, -0.1, 0.1), 1.0), ((0.6, 0.6, 0.6), 1.0)])
def test_a_difference_has_its_colour_in_every_run(offset: tuple[float, ...], share: float) -> None:
    reference = torch.full((3, 12, 14), 0.3)
    expected = cividis(torch.tensor(share)).expand(12, 14, 3)
    torch.testing.assert_close(difference(reference + torch.tensor(offset).view(3, 1, 1), reference), expected, atol=1e-5, rtol=0)


# --- as torchmetrics has them

@pytest.mark.parametrize("noise", [0.5, 0.1, 0.003])
@pytest.mark.parametrize("size", [(40, 33), (WINDOW, WINDOW)])
def test_as_torchmetrics(noise: float, size: tuple[int, int]) -> None:
    require_import("torchmetrics")
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    batches = pictures(noise=noise, size=size)
    image, reference = channels_first(*batches)
    found = [measure(*pair) for pair in pairs(*batches)]
    theirs = float(peak_signal_noise_ratio(image, reference, data_range=1.0))
    assert psnr(image, reference) == pytest.approx(theirs, abs=1e-4)
    assert decibels(sum(one.mse for one in found) / 3) == pytest.approx(theirs, abs=1e-4)
    similarity = structural_similarity_index_measure(image.double(), reference.double(), data_range=1.0)
    assert sum(one.ssim for one in found) / 3 == pytest.approx(float(similarity), abs=2e-6)


# --- batches

def test_one_by_one_is_the_whole() -> None:
    batches = pictures()
    image, reference = channels_first(*batches)
    for row, pair in enumerate(pairs(*batches)):
        assert torch.equal(pair[0], image[row]) and torch.equal(pair[1], reference[row])
    together = torch.cat([batch.flatten(0, 1).movedim(-1, 0) for batch in batches[:1]], dim=1)
    other = batches[1].flatten(0, 1).movedim(-1, 0)
    apart = torch.cat([difference(*pair) for pair in pairs(*batches)])
    assert torch.equal(difference(together, other), apart)


def test_one_picture_is_held_to_each_of_a_batch() -> None:
    image, reference = pictures()
    for one, many in ((image[:1], reference), (image, reference[:1])):
        found = [measure(*pair) for pair in pairs(one, many)]
        assert found == [measure(*next(pairs(one[min(row, len(one) - 1)][None], many[min(row, len(many) - 1)][None]))) for row in range(3)]
        assert refusal(one, many) is None


def test_alpha_is_left_out_and_values_are_cut_off() -> None:
    image, reference = pictures()
    with_alpha = torch.cat([image, torch.rand(*image.shape[:3], 1)], dim=-1)
    assert [measure(*pair) for pair in pairs(with_alpha, reference)] == [measure(*pair) for pair in pairs(image, reference)]
    assert refusal(with_alpha, reference) is None
    assert all(measure(*pair).largest == 0 for pair in pairs(torch.full((2, 12, 12, 3), 1.5), torch.ones(2, 12, 12, 3)))


def test_half_precision_is_measured_in_full() -> None:
    image, reference = pictures()
    (picture, other), *_ = pairs(image.half(), reference)
    assert picture.dtype == other.dtype == torch.float32 and decibels(measure(picture, image[0].movedim(-1, 0)).mse) > 60


# --- refusals

def blank(rows: int = 1, height: int = 16, width: int = 20, channels: int = 3) -> Tensor:
    return torch.zeros(rows, height, width, channels)


@pytest.mark.parametrize("image, reference, words", [
    (blank(), blank(height=32), ["image is 20 × 16 pixels", "reference is 20 × 32", "resize one"]),
    (blank(height=10), blank(height=10), ["20 × 10 pixels", "11 × 11", "upscale both"]),
    (blank(2), blank(3), ["image is a batch of 2", "reference a batch of 3", "a single picture"]),
    (blank(channels=1), blank(), ["colour channels is 1 in image and 3 in reference", "RGB"]),
    (blank(0), blank(), ["the batch at image is empty"]),
    (blank(), blank(0), ["the batch at reference is empty"]),
    (blank(), blank(4).index_fill(0, torch.tensor([2]), math.nan), ["picture 3 of 4 at reference", "NaN"]),
    (blank() / 0, blank(), ["picture 1 of 1 at image", "--fp32-vae"]),
])
def test_what_cannot_be_compared(image: Tensor, reference: Tensor, words: list[str]) -> None:
    reason = refusal(image, reference)
    assert all(word in reason for word in words), reason


def test_what_can() -> None:
    assert refusal(*pictures()) is None and refusal(blank(channels=1), blank(channels=1)) is None
