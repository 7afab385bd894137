"""The plain LoRA: beside a model, in it, and in its file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dydit_core.lora import LoRA, load_lora, merge, new_lora, save_lora
from dydit_core.models.flux import Flux, FluxConfig


@pytest.fixture
def model() -> Flux:
    torch.manual_seed(0)
    model = Flux(FluxConfig(32, 1, 2, in_channels=2, context_in_dim=8, vec_in_dim=8, axes_dim=(4, 6, 6)))
    return model.eval().requires_grad_(False)


def velocity(model: Flux) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x, context, pooled = (torch.randn(shape, generator=generator) for shape in ((2, 2, 8, 8), (2, 3, 8), (2, 8)))
    return model(x, torch.tensor([1.0, 0.4]), context, pooled)


def trained(model: Flux) -> LoRA:
    lora = new_lora(model, rank=4)
    for up in lora.up:
        nn.init.normal_(up, std=0.1)
    return lora


def test_an_untrained_lora_is_on_every_linear_layer_and_adds_nothing(model: Flux) -> None:
    lora, base = new_lora(model, rank=4), velocity(model)
    assert set(lora.names) == {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    with lora.beside(model):
        assert torch.equal(velocity(model), base)


def test_beside_the_model_is_merged_into_it(model: Flux) -> None:
    lora, base = trained(model), velocity(model)
    with lora.beside(model):
        beside = velocity(model)
    assert (beside - base).abs().max() > 0.01
    assert torch.equal(velocity(model), base), "the LoRA is still there"
    merge(model, lora)
    torch.testing.assert_close(velocity(model), beside, rtol=0, atol=1e-5)


def test_the_model_is_itself_again_after_an_error(model: Flux) -> None:
    base = velocity(model)
    with pytest.raises(RuntimeError), trained(model).beside(model):
        model(torch.zeros(1, 3, 8, 8), torch.ones(1), torch.zeros(1, 3, 8), torch.zeros(1, 8))
    assert torch.equal(velocity(model), base)


def test_its_file_holds_it_in_half_precision(model: Flux, tmp_path: Path) -> None:
    lora = trained(model)
    save_lora(tmp_path / "lora.safetensors", lora, {"modelspec.title": "A LoRA"})
    with safe_open(tmp_path / "lora.safetensors", "pt") as file:
        assert file.metadata() == {"modelspec.title": "A LoRA"}
        assert "diffusion_model.single_blocks.1.linear2.lora_down.weight" in file.keys()
    again = {name: factors for name, *factors in load_lora(tmp_path / "lora.safetensors").factors()}
    assert set(again) == set(lora.names)
    for name, *factors in lora.factors():
        for one, other in zip(factors, again[name]):
            torch.testing.assert_close(other, one.detach(), rtol=1e-3, atol=1e-6)
