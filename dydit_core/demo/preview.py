"""Contact sheets: pictures side by side, for eyes."""

from __future__ import annotations

import torch
from PIL import Image
from torch import Tensor

from ..models.flux import Flux
from .prompt import encode_batch
from ..sampling import sample
from .vae import Decoder, decode


def pictures(model: Flux, decoder: Decoder, prompts: list[str], steps: int = 20, cfg: float = 1.0,
             seed: int = 0) -> Tensor:
    """Sampled images [prompts, 3, 256, 256] in 0…1, eight prompts at a time; prompt i always gets the same noise."""
    uncond = encode_batch([""])
    images = []
    for start in range(0, len(prompts), 8):
        context, pooled = encode_batch(prompts[start : start + 8])
        noise = torch.stack([torch.randn(16, 32, 32, generator=torch.Generator().manual_seed(seed + start + row))
                             for row in range(len(context))])
        images.append(decode(sample(model, (context, pooled), noise, steps, cfg, uncond), decoder))
    return torch.cat(images)


def sheet(images: Tensor, columns: int) -> Image.Image:
    """Lay out images [n, 3, H, W] in 0…1 row by row."""
    rows = -(-len(images) // columns)
    height, width = images.shape[-2:]
    canvas = Image.new("RGB", (columns * width, rows * height))
    for index, image in enumerate(images):
        pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
        canvas.paste(Image.fromarray(pixels), (index % columns * width, index // columns * height))
    return canvas
