"""How far a picture is from its reference: PSNR, SSIM, and where they differ, on a fixed scale of colours."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import repeat

import torch
from torch import Tensor
from torch.nn import functional as F

from .colours import cividis

FULL_SCALE = 0.1  # a budget's differences are small: at 0.75 the demo's largest is near 0.05, at 0.5 near 0.1
WINDOW = 11
_SIGMA = 1.5
_C1, _C2 = 0.01**2, 0.03**2


@dataclass(frozen=True)
class Likeness:
    """One picture held to its reference, values in 0…1: the mean squared error, the mean SSIM, and the largest pixel of the
    absolute difference (mean of red, green and blue)."""

    mse: float
    ssim: float
    largest: float


def psnr(images: Tensor, reference: Tensor, weight: Tensor | None = None) -> float:
    """Decibels from the squared error pooled over all images [rows, channels, H, W] in 0…1; inf if identical.

    `weight` [rows, 1, H, W] is 1 where a pixel counts and 0 elsewhere.
    """
    error = (images - reference).square().mean(1, keepdim=True)
    return decibels(float(error.mean() if weight is None else (error * weight).sum() / weight.sum().clamp(min=1)))


def psnr_of_differences(frames: Tensor, reference: Tensor) -> float:
    """Decibels from the squared error of what changes from a frame to the next, of videos [rows, frames, channels, H, W] in 0…1,
    pooled over all of them; inf if it is the same.

    A change lies in −1…1; the peak is 1, as for the frames, so that both numbers compare. Errors that stand still do not count,
    flicker counts double.
    """
    return decibels(float((frames.diff(dim=1) - reference.diff(dim=1)).square().mean()))


def decibels(mse: float) -> float:
    """PSNR of a mean squared error of values in 0…1; inf for none."""
    return 10 * math.log10(1 / mse) if mse > 0 else math.inf


def ssim(picture: Tensor, reference: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of [channels, H, W] in 0…1, mean over all pixels and channels.

    Beyond its edges a picture is mirrored, as in torchmetrics; H and W must be at least `WINDOW`.
    """
    return sum(_ssim(*planes) for planes in zip(picture, reference)) / len(picture)


def _ssim(x: Tensor, y: Tensor) -> float:
    x, y = F.pad(torch.stack([x, y]), [WINDOW // 2] * 4, mode="reflect")
    mean_x, mean_y, power, error = _blurred(torch.stack([x, y, x * x + y * y, (x - y).square()]))
    # Both terms written as 1 - what differs: as published, float32 is off by 0.001 where a picture is flat.
    unlike = (mean_x - mean_y).square()
    power_of_means = mean_x.square() + mean_y.square()
    luminance = 1 - unlike / (power_of_means + _C1)
    structure = 1 - (error - unlike) / (power - power_of_means + _C2)
    return float((luminance * structure).mean())


def _blurred(planes: Tensor) -> Tensor:
    """Means [..., H - 10, W - 10] under the Gaussian window, one axis after the other."""
    # Shifted sums: on a CPU the stock convolution of single planes takes 20 times as long.
    offsets = range(WINDOW)
    weights = [math.exp(-((k - WINDOW // 2) ** 2) / (2 * _SIGMA**2)) for k in offsets]
    for axis in (-2, -1):
        size = planes.shape[axis] - WINDOW + 1
        blurred = torch.zeros_like(planes.narrow(axis, 0, size))
        for k in offsets:
            blurred.add_(planes.narrow(axis, k, size), alpha=weights[k] / sum(weights))
        planes = blurred
    return planes


def pairs(image: Tensor, reference: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Each picture and its reference, [channels, H, W] in 0…1 without alpha, of batches [rows, H, W, channels].

    One image goes with every image of the other batch. Values beyond 0…1 are cut off, as they are when a picture is saved.
    """
    rows = max(len(image), len(reference))
    batches = (repeat(batch[0], rows) if len(batch) == 1 else batch for batch in (image, reference))
    for pair in zip(*batches):
        picture, other = (one[..., :3].to(image.device, torch.float32).clamp(0, 1).movedim(-1, 0) for one in pair)
        yield picture, other


def measure(picture: Tensor, reference: Tensor) -> Likeness:
    """Of one pair of `pairs`."""
    error = picture - reference
    return Likeness(float(error.square().mean()), ssim(picture, reference), float(error.abs().mean(0).max()))


def difference(picture: Tensor, reference: Tensor) -> Tensor:
    """One pair's absolute difference, mean over channels, in colours [H, W, 3]: the end of the scale is `FULL_SCALE` and more."""
    return cividis((picture - reference).abs().mean(0) / FULL_SCALE)


def refusal(image: Tensor, reference: Tensor) -> str | None:
    """Why two batches [rows, H, W, channels] cannot be compared, or None. It names them `image` and `reference`."""
    batches = {"image": image, "reference": reference}
    for name, batch in batches.items():
        if not len(batch):
            return f"the batch at {name} is empty; connect at least one picture"
    sizes = [f"{batch.shape[2]} × {batch.shape[1]}" for batch in batches.values()]
    if sizes[0] != sizes[1]:
        return (f"image is {sizes[0]} pixels and reference is {sizes[1]}; resize one of them, or give both samplers the same "
                "Empty Latent Image")
    if min(image.shape[1:3]) < WINDOW:
        return f"the pictures are {sizes[0]} pixels and SSIM looks through windows of {WINDOW} × {WINDOW}; upscale both, or draw them larger"
    if len(image) != len(reference) and 1 not in (len(image), len(reference)):
        return (f"image is a batch of {len(image)} and reference a batch of {len(reference)}; give both the same number of pictures, "
                "or one of them a single picture")
    channels = [min(batch.shape[3], 3) for batch in batches.values()]
    if channels[0] != channels[1]:
        return f"the number of colour channels is {channels[0]} in image and {channels[1]} in reference; convert both to RGB"
    return next((reason for name, batch in batches.items() if (reason := _broken(name, batch))), None)


def _broken(name: str, batch: Tensor) -> str | None:
    for number, picture in enumerate(batch, 1):
        if not picture.isfinite().all():
            return (f"picture {number} of {len(batch)} at {name} has pixels that are not numbers (NaN or infinity), so what drew it ran "
                    "out of range; run its model or VAE in a wider precision (bf16, or --fp32-vae)")
    return None
