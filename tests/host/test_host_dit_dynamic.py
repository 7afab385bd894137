"""DiT and Latte as the host makes them under DynamicVRAM, its default on NVIDIA cards: weights as they lie in the file, and none before.

There is no such card here, so layers are made and loaded as there, and run as the host runs them on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import tiny_latte
import torch
from dit_files import load, models, write  # noqa: F401 - the fixture works by being here
from tiny import budgeted, last_trace  # first: starts the host
from tiny_dit import config, dit, load_dit, network, sample, transformer

import comfy.memory_management
import comfy.model_management
import comfy.model_patcher
import comfy.ops
from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.checkpoints.fit import sketch
from dydit_pack.nodes.backend import ComfyBackend
from dydit_pack.nodes.dit import dit_model

LOOKED_UP = ("pos_embed", "y_embedder.embedding_table.weight")


class Dynamic(ModelPatcher):
    def is_dynamic(self) -> bool:
        return True


@contextmanager
def dynamic_vram() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comfy.memory_management, "aimdo_enabled", True)
        patch.setattr(comfy.model_patcher, "CoreModelPatcher", Dynamic)
        yield


def made(build: Callable[[], ModelPatcher]) -> ModelPatcher:
    """As the host makes and prepares it: each layer has its place in virtual memory and fetches its weights for each call."""
    with dynamic_vram():
        model = build()
    model.__class__ = ModelPatcher  # what follows would need the card
    for module in transformer(model).modules():
        if isinstance(module, comfy.ops.CastWeightBiasOp):
            module.comfy_cast_weights, module._v = True, None
    return model


def test_products_are_made_on_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where streamed weights lie: on the CPU the host gives them without their LoRAs."""
    card = torch.device("meta")
    monkeypatch.setattr("dydit_pack.nodes.backend.get_torch_device", lambda: card)
    streamed, loaded = (transformer(model).t_embedder.mlp[0] for model in (made(lambda: load_dit(config())), dit()))
    assert [ComfyBackend().device(layer) for layer in (streamed, loaded)] == [card, torch.device("cpu")]


def test_a_picture_and_a_video_are_the_same() -> None:
    assert torch.equal(sample(made(lambda: load_dit(config())), 4, 3.0), sample(dit(), 4, 3.0))
    video = made(lambda: load_dit(tiny_latte.config()))
    assert torch.equal(tiny_latte.sample(video, 3, 3.0), tiny_latte.sample(tiny_latte.latte(), 3, 3.0))


@pytest.mark.parametrize("method, budget", [("checkpoint", 0.3), ("learned tokens", 0.6), ("changed tokens", 0.6)])
def test_a_budget_with_weights_that_are_cut(models: Path, method: str, budget: float) -> None:
    plain, adapter = load(write(models, "dynamic.safetensors", config()))
    streamed = made(lambda: load_dit(config()))  # of the same tensors: the host's reader of files would need the card
    assert sketch(transformer(streamed)) == sketch(transformer(plain)) and adapter.fit.warning(transformer(streamed)) is None
    expected = sample(budgeted(plain, budget, adapter=adapter, method=method), 6, 3.0)
    found = sample(budgeted(streamed, budget, adapter=adapter, method=method), 6, 3.0)
    assert torch.equal(found, expected) and last_trace().facts["achieved"] < 0.9


def test_what_is_looked_up_is_never_brought_into_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the host brings a weight into is written on its layer."""
    monkeypatch.setattr(comfy.model_management.args, "fp8_e4m3fn_unet", True)
    network_in_fp8 = transformer(made(lambda: load_dit(config())))
    assert network_in_fp8.blocks[0].mlp.fc1.weight_comfy_model_dtype == torch.float8_e4m3fn
    assert network_in_fp8.y_embedder.embedding_table.weight_comfy_model_dtype == network_in_fp8.pos_embed_comfy_model_dtype == torch.float32
    for name in LOOKED_UP:
        assert torch.equal(network_in_fp8.get_parameter(name), network(config()).get_parameter(name))


def test_a_copy_for_other_nodes_is_in_one_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """A float32 file on a card that computes in bfloat16, under the stock compile node or with a hook: those ask for a copy that is not dynamic."""
    monkeypatch.setattr(comfy.model_management, "unet_dtype", lambda **facts: torch.bfloat16)
    monkeypatch.setattr(comfy.model_management, "unet_manual_cast", lambda *facts: None)
    expected = sample(load_dit(config()), 4, 3.0)
    with dynamic_vram():
        copy = load_dit(config(), disable_dynamic=True)
    types = {name: value.dtype for name, value in transformer(copy).named_parameters()}
    assert all(type == (torch.float32 if name in LOOKED_UP else torch.bfloat16) for name, type in types.items())
    assert torch.equal(sample(copy, 4, 3.0), expected)


def test_a_file_of_bfloat16() -> None:
    halves = {key: value.bfloat16() for key, value in network(config()).state_dict().items()}
    expected = sample(dit_model(config(), halves), 4, 3.0)
    assert torch.equal(sample(made(lambda: dit_model(config(), halves)), 4, 3.0), expected)
