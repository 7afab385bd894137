"""The stock loaders take the demo's files, and the host samples the picture that our own sampler does."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` importable

import comfy.sample
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy.model_base import Flux as HostFlux

from dydit_core.demo.base import load_base
from dydit_core.demo.files import BASE_FILE, VAE_FILE, WEIGHTS
from dydit_core.demo.prompt import encode
from dydit_core.sampling import sample
from dydit_core.demo.vae import FLUX_SCALE, FLUX_SHIFT, decode, load_decoder

MODEL, VAE = WEIGHTS / BASE_FILE, WEIGHTS / VAE_FILE
pytestmark = pytest.mark.skipif(not (MODEL.exists() and VAE.exists()), reason="the demo's weights are not in this checkout")


def test_stock_sampling_and_decoding_give_our_picture() -> None:
    prompt = encode("a red house on the left, day, meadow")
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    ours = sample(load_base(MODEL), (prompt.context[None], prompt.pooled[None]), noise, steps=4)

    patcher = comfy.sd.load_diffusion_model(str(MODEL), model_options={"dtype": torch.float32})
    assert isinstance(patcher.model, HostFlux)
    positive = [[prompt.context[None], {"pooled_output": prompt.pooled[None]}]]
    theirs = comfy.sample.sample(patcher, noise, 4, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise))
    theirs_in = (theirs - FLUX_SHIFT) * FLUX_SCALE
    assert (theirs_in - ours).abs().max() < 1e-3

    vae = comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(VAE)))
    picture = vae.decode(theirs).permute(0, 3, 1, 2)
    assert picture.shape == (1, 3, 256, 256)
    assert (picture - decode(ours, load_decoder(VAE))).abs().max() < 0.01
