"""The training pictures and videos of the class-conditional demo models, as latents on disk; drawn once, the same from any start."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..storage import write_atomically
from .classes import class_scene
from .data import Log, draw
from .moving import film, moving_scene
from .vae import Encoder, load_learned_encoder

CHUNK, AT_ONCE = 256, 16
# Scenes from this number on are never trained on.
FRESH = 1 << 20


@dataclass(frozen=True)
class Source:
    """`scene(index)` is a numbered scene and its class; `draw` makes [scenes, …, 3, H, W] in 0…1 of some. `name`: of their folder."""

    name: str
    scene: Callable[[int], tuple[object, int]]
    draw: Callable[[list], Tensor]

    def drawn(self, first: int, last: int) -> Tensor:
        return self.draw([self.scene(index)[0] for index in range(first, last)])


PICTURES = Source("scenes", class_scene, draw)
VIDEOS = Source("videos", moving_scene, film)


@dataclass(frozen=True)
class ClassData:
    """`latents` [scenes, 4, 32, 32], of videos [scenes, 4, 8, 16, 16], in half precision and `labels` [scenes], in shared memory."""

    latents: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[index].float(), self.labels[index]


def load_class_data(work: Path, vae: Path, scenes: int, log: Log = print, source: Source = PICTURES) -> ClassData:
    """The first `scenes` scenes, in whole chunks; those that this VAE has not encoded yet are drawn and encoded now."""
    folder = work / f"{source.name}_{hashlib.sha256(vae.read_bytes()).hexdigest()[:8]}"
    encoder, chunks = load_learned_encoder(vae), []
    for start in range(0, scenes, CHUNK):
        path = folder / f"{start:06d}.pt"
        if not path.exists():
            parts = [source.drawn(first, min(first + AT_ONCE, start + CHUNK)) for first in range(start, start + CHUNK, AT_ONCE)]
            latents = torch.cat([encode(part, encoder) for part in parts]).half()
            write_atomically(path, lambda partial: torch.save(latents, partial))
        chunks.append(torch.load(path, weights_only=True))
        if start % (CHUNK * 16) == 0:
            log(f"{source.name} {start + CHUNK} / {scenes}")
    latents = torch.cat(chunks)
    labels = torch.tensor([source.scene(index)[1] for index in range(len(latents))])
    return ClassData(latents.share_memory_(), labels.share_memory_())


def encode(images: Tensor, encoder: Encoder) -> Tensor:
    """Latents [n, 4, …, H, W] of pictures [n, 3, 8H, 8W] or of the frames of videos [n, frames, 3, 8H, 8W]."""
    # What bfloat16 rounds off is a twentieth of the noise that the VAE was trained with.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = torch.cat([encoder(rows) for rows in images.flatten(0, -4).split(AT_ONCE)])
    return latents.unflatten(0, images.shape[:-3]).movedim(-3, 1)
