"""Trains the 4-channel VAE of the class-conditional demo models: an encoder and a decoder of TAESD's layout, together.

Four numbers for 8 × 8 pixels are too few for a projection (see `codec`); the encoder starts as the best one and learns
from there. Latents are normalised to mean 0 and spread 1 for each channel while it trains; noise on them makes it put near
things near each other.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from ..train.resume import resume, save
from .classes import class_scene
from .codec import PATCH_DIM, PatchCodec, fit_codec
from .data import Log, draw
from .decoder import BATCH, CROP, RATE, calm_blocks, crops, descend, learning_rate
from .vae import SQUASH, Decoder, Encoder, sort_pixels, where_pixel_goes

CHANNELS = 4
CHECKPOINT = "autoencoder.pt"
PICTURES = 768
NOISE = 0.15
# Of the encoder, over the decoder's: what it starts as is worth keeping.
ENCODER_PACE = 0.3
SAVE_EVERY = 100


class Autoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = Encoder(CHANNELS), Decoder(CHANNELS)
        self.spread = nn.BatchNorm2d(CHANNELS, affine=False, momentum=0.02)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Images [rows, 3, H, W] in 0…1 again, from latents that `noise` [rows, 4, H/8, W/8] was added to."""
        latent = self.spread(self.encoder(images).float())
        return self.decoder(latent + noise)

    def parts(self) -> tuple[Encoder, Decoder]:
        """Encoder and decoder without the normalisation, which is in the encoder's last layer then."""
        encoder, spread = Encoder(CHANNELS), (self.spread.running_var + self.spread.eps).sqrt()
        encoder.load_state_dict(self.encoder.state_dict())
        last = encoder.layers["14"]
        with torch.no_grad():
            last.weight.div_(spread[:, None, None, None])
            last.bias.copy_((last.bias - self.spread.running_mean * SQUASH) / spread)
        return encoder.eval().requires_grad_(False), self.decoder.eval().requires_grad_(False)


def train_autoencoder(work: Path, steps: int, seed: int = 0, log: Log = print) -> tuple[Encoder, Decoder]:
    """Train, or continue, the autoencoder in `work` until it has taken `steps` steps."""
    torch.manual_seed(seed)
    model = Autoencoder()
    groups = [{"params": part.parameters(), "pace": pace} for part, pace in ((model.encoder, ENCODER_PACE), (model.decoder, 1.0))]
    optimizer = torch.optim.AdamW(groups, RATE, betas=(0.9, 0.99), weight_decay=0.0)
    first = resume(work / CHECKPOINT, model, optimizer)
    if first >= steps:
        return model.parts()
    images = draw([class_scene(index)[0] for index in range(PICTURES)])
    if not first:
        calm_blocks(model.decoder)
        project(model.encoder, fit_codec(images, CHANNELS))
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps) * group["pace"]
        generator = torch.Generator().manual_seed(seed + step)
        target = crops(images, generator).contiguous(memory_format=torch.channels_last)
        level = NOISE * torch.rand(BATCH, 1, 1, 1, generator=generator)
        noise = level * torch.randn(BATCH, CHANNELS, CROP, CROP, generator=generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(target, noise)
        error = descend(model, optimizer, output.float() - target)
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            log(f"autoencoder step {done} PSNR {-10 * error.log10().item():.2f} dB")
            save(work / CHECKPOINT, model, optimizer, done)
    return model.parts()


@torch.no_grad()
def project(encoder: Encoder, codec: PatchCodec) -> None:
    """Make `encoder` the patch projection of `codec`, but for what its latents have in common; where that leaves channels over, they
    stay random and are not heard yet. A ReLU keeps half of a number, so the projection is there twice, once negative."""
    layers = encoder.layers
    for name, block in layers.items():
        if hasattr(block, "conv"):
            nn.init.zeros_(block.conv[4].weight)
            nn.init.zeros_(block.conv[4].bias)
    layers["0"].weight[:3] = torch.zeros(3, 3, 3, 3)
    layers["0"].weight[range(3), range(3), 1, 1] = 1
    layers["0"].bias[:3] = 0
    for name, channels in (("2", 3), ("6", 12)):
        weight = layers[name].weight
        weight[: 4 * channels] = sort_pixels(channels)[: 4 * channels, : weight.shape[1]]
    third = torch.zeros(CHANNELS, layers["10"].in_channels, 3, 3)
    for pixel in range(PATCH_DIM):
        channel, (row, column) = where_pixel_goes(pixel)
        third[:, channel, 1 + row, 1 + column] = codec.encode[pixel]
    layers["10"].weight[: 2 * CHANNELS] = torch.cat([third, -third])
    last = layers["14"]
    nn.init.zeros_(last.weight)
    last.weight[range(CHANNELS), range(CHANNELS), 1, 1] = SQUASH
    last.weight[range(CHANNELS), range(CHANNELS, 2 * CHANNELS), 1, 1] = -SQUASH
