"""Trains the demo's decoder: latents of the patch codec back to pictures, with sharp edges."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..train.resume import resume, save
from .codec import PATCH, PatchCodec
from .data import Log, draw, load_codec, training_scene
from .vae import Decoder

CHECKPOINT = "decoder.pt"
PICTURES = 768
BATCH, CROP = 16, 12
RATE, WARM_STEPS = 3e-3, 40
# Samples are not perfect latents; a decoder that has seen noise up to this much forgives them.
NOISE = 0.12
SAVE_EVERY = 100


def train_decoder(work: Path, steps: int, seed: int = 0, log: Log = print) -> Decoder:
    """Train, or continue, the decoder in `work` until it has taken `steps` steps."""
    torch.manual_seed(seed)
    decoder = Decoder()
    calm_blocks(decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.0)
    first = resume(work / CHECKPOINT, decoder, optimizer)
    if first >= steps:
        return decoder.eval()
    codec = load_codec(work, log)
    images = draw([training_scene(index)[0] for index in range(PICTURES)])
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        error = _train_step(decoder, optimizer, codec, images, torch.Generator().manual_seed(seed + step))
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            log(f"decoder step {done} PSNR {-10 * error.log10().item():.2f} dB")
            save(work / CHECKPOINT, decoder, optimizer, done)
    return decoder.eval()


def _train_step(decoder: Decoder, optimizer: torch.optim.Optimizer, codec: PatchCodec, images: Tensor,
                generator: torch.Generator) -> Tensor:
    """One step on random crops; returns the mean squared error."""
    target = crops(images, generator)
    latent = codec.to_latent(target)
    level = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
    latent = latent + level * torch.randn(latent.shape, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = decoder(latent.contiguous(memory_format=torch.channels_last))
    return descend(decoder, optimizer, output.float() - target)


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, difference: Tensor) -> Tensor:
    """One optimizer step on what pictures [rows, 3, H, W] are off, their edges too; returns the mean squared error."""
    edges = difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()
    square = difference.pow(2).mean()
    loss = difference.abs().mean() + 4 * square + 0.5 * edges
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return square.detach()


def learning_rate(step: int, steps: int) -> float:
    """Warms up, and falls to nothing from 40 % of the way on."""
    return RATE * min(1.0, (step + 1) / WARM_STEPS) * min(1.0, (steps - step) / (0.6 * steps))


def crops(images: Tensor, generator: torch.Generator) -> Tensor:
    """[BATCH, 3, 96, 96] cut out of `images` on the patch grid."""
    limit = images.shape[-1] // PATCH - CROP + 1
    rows = torch.randint(len(images), (BATCH,), generator=generator).tolist()
    corners = (torch.randint(limit, (BATCH, 2), generator=generator) * PATCH).tolist()
    size = CROP * PATCH
    return torch.stack([images[row, :, y : y + size, x : x + size] for row, (y, x) in zip(rows, corners)])


def calm_blocks(model: nn.Module) -> None:
    """Start residual blocks near the identity."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("conv.4.weight"):
                parameter.mul_(0.3)
