"""The host's own Load LoRA node takes a file of ours, and samples what our merged model does."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` importable

from pathlib import Path

import comfy.sample
import comfy.sd
import folder_paths
import nodes as host_nodes
import pytest
import torch
from torch import nn

from dydit_core.demo.base import load_base
from dydit_core.demo.files import BASE_FILE, WEIGHTS
from dydit_core.demo.prompt import encode
from dydit_core.sampling import sample
from dydit_core.demo.vae import FLUX_SCALE, FLUX_SHIFT
from dydit_core.lora import load_lora, merge, new_lora, save_lora

pytestmark = pytest.mark.skipif(not (WEIGHTS / BASE_FILE).exists(), reason="the demo's weights are not in this checkout")


def test_the_stock_loader_merges_our_lora(caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    model = load_base(WEIGHTS / BASE_FILE)
    lora = new_lora(model, rank=4)
    for up in lora.up:
        nn.init.normal_(up, std=0.02)
    file = Path(folder_paths.get_folder_paths("loras")[0]) / "few_steps.safetensors"
    save_lora(file, lora, {})

    patcher = comfy.sd.load_diffusion_model(str(WEIGHTS / BASE_FILE), model_options={"dtype": torch.float32})
    patched, = host_nodes.LoraLoaderModelOnly().load_lora_model_only(patcher, file.name, 1.0)
    assert set(patched.patches) == {f"diffusion_model.{name}.weight" for name in lora.names}
    assert "not loaded" not in caplog.text

    prompt = encode("a red house on the left, day, meadow")
    noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(0))
    positive = [[prompt.context[None], {"pooled_output": prompt.pooled[None]}]]
    theirs = comfy.sample.sample(patched, noise, 4, 1.0, "euler", "simple", positive, positive, torch.zeros_like(noise))
    theirs_in = (theirs - FLUX_SHIFT) * FLUX_SCALE
    base = sample(model, (prompt.context[None], prompt.pooled[None]), noise, steps=4)
    merge(model, load_lora(file))
    ours = sample(model, (prompt.context[None], prompt.pooled[None]), noise, steps=4)
    assert (ours - base).abs().max() > 0.1
    assert (theirs_in - ours).abs().max() < 1e-3
