"""The stock VAE loader takes the 4-channel VAE of the class-conditional demo models, as one for Stable Diffusion's latents."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` importable

from pathlib import Path

import comfy.sd
import comfy.utils
import torch
from comfy.latent_formats import SD15

from dydit_core.demo.autoencoder import CHANNELS, Autoencoder, project
from dydit_core.demo.classes import class_scene
from dydit_core.demo.codec import fit_codec
from dydit_core.demo.data import draw
from dydit_core.demo.vae import decode, export_learned_vae, load_decoder, load_learned_encoder


def test_it_encodes_and_decodes_as_in_training(tmp_path: Path) -> None:
    torch.manual_seed(0)
    images, model = draw([class_scene(index)[0] for index in range(2)]), Autoencoder()
    project(model.encoder, fit_codec(images, CHANNELS))
    path, latents = tmp_path / "vae.safetensors", SD15()
    export_learned_vae(*model.parts(), path)
    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))
    ours = load_learned_encoder(path)(images)
    assert vae.latent_channels == 4
    assert (latents.process_in(vae.encode(images.permute(0, 2, 3, 1)).float()) - ours).abs().max() < 1e-4
    pictures = vae.decode(latents.process_out(ours)).permute(0, 3, 1, 2)
    assert (pictures - decode(ours, load_decoder(path))).abs().max() < 1e-4
