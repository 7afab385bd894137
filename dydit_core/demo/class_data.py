"""The training pictures of the class-conditional demo models, as latents on disk; drawn once, the same from any start."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..storage import write_atomically
from .classes import class_scene
from .data import Log, draw
from .vae import load_learned_encoder

CHUNK = 256
# Scenes from this number on are never trained on.
FRESH = 1 << 20


@dataclass(frozen=True)
class ClassData:
    """`latents` [scenes, 4, 32, 32] in half precision and `labels` [scenes], in shared memory."""

    latents: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[index].float(), self.labels[index]


def load_class_data(work: Path, vae: Path, scenes: int, log: Log = print) -> ClassData:
    """The first `scenes` scenes, in whole chunks; those that this VAE has not encoded yet are drawn and encoded now."""
    folder = work / f"scenes_{hashlib.sha256(vae.read_bytes()).hexdigest()[:8]}"
    encoder, chunks = load_learned_encoder(vae), []
    for start in range(0, scenes, CHUNK):
        path = folder / f"{start:06d}.pt"
        if not path.exists():
            images = draw([class_scene(index)[0] for index in range(start, start + CHUNK)])
            # What bfloat16 rounds off is a twentieth of the noise that the VAE was trained with.
            with torch.autocast("cpu", dtype=torch.bfloat16):
                latents = torch.cat([encoder(rows) for rows in images.split(16)]).half()
            write_atomically(path, lambda partial: torch.save(latents, partial))
        chunks.append(torch.load(path, weights_only=True))
        if start % (CHUNK * 16) == 0:
            log(f"scenes {start + CHUNK} / {scenes}")
    latents = torch.cat(chunks)
    labels = torch.tensor([class_scene(index)[1] for index in range(len(latents))])
    return ClassData(latents.share_memory_(), labels.share_memory_())
