"""Draws the training pictures and keeps them as latents on disk; drawn once, resumable, the same from any start."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..storage import write_atomically
from .codec import CHANNELS, PATCH, PatchCodec, fit_codec
from .prompt import CONTEXT_DIM, CONTEXT_SCALE, CONTEXT_TOKENS, POOLED_DIM, encode
from .scenes import SIZE, Scene, caption, random_scene, render

FIT_PICTURES = 1024
CAPTIONS = 2
# One caption in four leaves things out, so that short prompts work too.
SHORT_CAPTIONS, SHORT_DETAIL = 0.25, 0.7
CHUNK = 256
LATENT = SIZE // PATCH

Log = Callable[[str], None]


def training_scene(index: int) -> tuple[Scene, list[str]]:
    """Scene number `index` and its captions."""
    rng = np.random.default_rng(index)
    scene = random_scene(rng)
    details = [SHORT_DETAIL if rng.random() < SHORT_CAPTIONS else 1.0 for _ in range(CAPTIONS)]
    return scene, [caption(scene, rng, detail) for detail in details]


def draw(scenes: list[Scene]) -> Tensor:
    """Pictures [scenes, 3, 256, 256] in 0…1."""
    pixels = np.stack([np.asarray(render(scene)) for scene in scenes])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def load_codec(work: Path, log: Log = print) -> PatchCodec:
    """The patch codec of this working directory, fitted to the first pictures if it is not there yet."""
    path = work / "codec.pt"
    if not path.exists():
        log(f"fitting the patch codec to {FIT_PICTURES} pictures")
        codec = fit_codec(draw([training_scene(index)[0] for index in range(FIT_PICTURES)]))
        write_atomically(path, lambda partial: torch.save(codec.state(), partial))
    return PatchCodec(**torch.load(path, weights_only=True))


@dataclass(frozen=True)
class SceneData:
    """All scenes in shared memory: `latents` [scenes, 16, 32, 32] in half precision, captions as 0/1 bytes."""

    latents: Tensor
    contexts: Tensor  # [scenes, captions, 16, 128] uint8
    pooled: Tensor  # [scenes, captions, 64] uint8

    def __len__(self) -> int:
        return len(self.latents)

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [rows, 16, 32, 32], contexts [rows, 16, 128] and pooled [rows, 64] in fp32; one caption each."""
        which = torch.randint(self.contexts.shape[1], (len(index),), generator=generator)
        latents = self.latents[index].float()
        return latents, self.contexts[index, which].float() * CONTEXT_SCALE, self.pooled[index, which].float()


def load_data(work: Path, scenes: int, log: Log = print) -> SceneData:
    """Open the first `scenes` training scenes; draws and encodes the ones that are missing."""
    codec = load_codec(work, log)
    chunks, captions = [], []
    for start in range(0, scenes, CHUNK):
        chunk, told = _chunk(work / "scenes", start, codec)
        chunks.append(chunk)
        captions += told
        if start % (CHUNK * 16) == 0:
            log(f"scenes {start + CHUNK} / {scenes}")
    contexts = torch.empty(len(captions), CAPTIONS, CONTEXT_TOKENS, CONTEXT_DIM, dtype=torch.uint8)
    pooled = torch.empty(len(captions), CAPTIONS, POOLED_DIM, dtype=torch.uint8)
    for row, told in enumerate(captions):
        for column, prompt in enumerate(told):
            encoded = encode(prompt)
            contexts[row, column] = encoded.context > 0
            pooled[row, column] = encoded.pooled
    latents = torch.from_numpy(np.concatenate(chunks)[:scenes])
    return SceneData(*(tensor.share_memory_() for tensor in (latents, contexts[:scenes], pooled[:scenes])))


def _chunk(folder: Path, start: int, codec: PatchCodec) -> tuple[np.ndarray, list[list[str]]]:
    """Latents and captions of scenes `start` … `start` + CHUNK, from disk or drawn now."""
    path, words = folder / f"{start:06d}.npy", folder / f"{start:06d}.json"
    if not (path.exists() and words.exists()):
        pairs = [training_scene(index) for index in range(start, start + CHUNK)]
        latents = codec.to_latent(draw([scene for scene, _ in pairs])).half().numpy()
        assert latents.shape == (CHUNK, CHANNELS, LATENT, LATENT)
        write_atomically(words, lambda partial: partial.write_text(json.dumps([told for _, told in pairs])))
        write_atomically(path, lambda partial: _save_array(partial, latents))
    return np.load(path), json.loads(words.read_text())


def _save_array(path: Path, array: np.ndarray) -> None:
    with open(path, "wb") as file:
        np.save(file, array)
