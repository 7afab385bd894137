"""What the demo can be trained on: prompts in its own words, and pictures with captions; and how its latents look."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ..checkpoints.files import bad
from ..train.examples import Examples
from ..train.preview import Painter, image
from .prompt import VOCABULARY, encode, encode_batch
from .vae import decode, load_decoder

PICTURES = (".png", ".jpg", ".jpeg", ".webp")


def prompt_examples(path: Path) -> Examples:
    """The prompts in a text file, one a line. Raises FileError."""
    return _examples(path, [line.strip() for line in _text(path).splitlines() if line.strip()])


def picture_examples(folder: Path, size: tuple[int, int], encoder: Callable[[Tensor], Tensor]) -> Examples:
    """Pictures cut to `size` (width, height) and encoded, with the captions beside them. Raises FileError."""
    if not folder.is_dir():
        raise bad(folder, "is not a folder", "give --images a folder of pictures, each with its caption in a .txt of the same name")
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    if not found:
        raise bad(folder, f"holds no pictures ({', '.join(PICTURES)})", "put some there, or train without --images, on prompts alone")
    captions = []
    for path in found:
        caption = path.with_suffix(".txt")
        if not caption.is_file():
            raise bad(path, "has no caption", f"write one into {caption}")
        captions.append(_text(caption).strip())
    latents = torch.cat([encoder(_picture(path, size)[None]) for path in found])
    return _examples(folder, captions, latents)


def painter(vae: Path) -> Painter:
    """Pictures of latents, through the demo's VAE."""
    decoder = load_decoder(vae)
    return lambda latents, dense: [image(picture) for picture in decode(latents, decoder)]


def _examples(source: Path, prompts: list[str], latents: Tensor | None = None) -> Examples:
    if not prompts:
        raise bad(source, "holds no prompts", "write one prompt a line")
    for prompt in prompts:
        if unknown := encode(prompt).unknown_words:
            raise bad(source, f'has the prompt "{prompt}" with words that the demo does not know ({", ".join(unknown)})',
                      f"use these: {', '.join(VOCABULARY[1:])}")
    return Examples(encode_batch(prompts), encode_batch([""]), latents)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise bad(path, f"cannot be read ({error.strerror})", "give the path of a text file") from None
    except UnicodeDecodeError:
        raise bad(path, "is no text in UTF-8", "save it as UTF-8") from None


def _picture(path: Path, size: tuple[int, int]) -> Tensor:
    """[3, height, width] in 0…1, the middle of the picture."""
    try:
        with Image.open(path) as picture:
            cut = ImageOps.fit(ImageOps.exif_transpose(picture).convert("RGB"), size)
        return torch.from_numpy(np.asarray(cut).copy()).permute(2, 0, 1).float() / 255
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise bad(path, "is no picture that can be read", "save it again as PNG or JPEG, or take it out of the folder") from None
