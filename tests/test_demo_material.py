"""What the demo is trained on: pictures through the encoder that ships, and captions."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image

from dydit_core.compare import psnr
from dydit_core.demo.data import draw, training_scene
from dydit_core.demo.files import VAE_FILE, WEIGHTS
from dydit_core.demo.material import painter, picture_examples, prompt_examples
from dydit_core.demo.prompt import encode_batch
from dydit_core.demo.vae import decode, load_decoder, load_encoder

VAE = WEIGHTS / VAE_FILE


def test_pictures_come_back_from_their_latents(tmp_path: Path) -> None:
    """A PNG with transparency, and one that is twice as wide as it is high: the middle of it is taken."""
    pictures = draw([training_scene(index)[0] for index in range(2)])
    files = [Image.fromarray((picture.permute(1, 2, 0) * 255).byte().numpy()) for picture in pictures]
    files[0].convert("RGBA").save(tmp_path / "a.png")
    wide = Image.new("RGB", (512, 256))
    wide.paste(files[1], (128, 0))
    wide.save(tmp_path / "b.PNG")
    for name, caption in (("a", "a red house, sea"), ("b", "a blue tree")):
        (tmp_path / f"{name}.txt").write_text(f"{caption}\n")
    (tmp_path / "notes.md").write_text("no picture")
    examples = picture_examples(tmp_path, (256, 256), load_encoder(VAE))
    assert torch.equal(examples.conditioning[0], encode_batch(["a red house, sea", "a blue tree"])[0]) and examples.latents.shape == (2, 16, 32, 32)
    assert psnr(decode(examples.latents, load_decoder(VAE)), pictures) > 32
    shown = painter(VAE)(examples.latents, examples.latents)
    assert [picture.size for picture in shown] == [(256, 256)] * 2


def test_prompts_are_lines(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red house\n\n  a blue tree  \n")
    examples = prompt_examples(file)
    assert len(examples) == 2 and examples.latents is None and torch.equal(examples.conditioning[1][1:], encode_batch(["a blue tree"])[1])
    assert torch.equal(examples.empty[0], encode_batch([""])[0])
