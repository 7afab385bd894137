"""What cannot work is refused in words an artist can act on: what is wrong, by name, and what to do."""

from __future__ import annotations

import asyncio
import os
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import CONTEXT, DOUBLE, SINGLE, TEXT, WIDTH, adapter, as_node, blocks, budgeted, flux, last_trace, sample  # first: starts the host

import comfy.ldm.flux.model
import comfy.ldm.hunyuan3d.model
import comfy.ldm.hunyuan_video.model
import comfy.ops
import dydit_pack
import folder_paths
from comfy.patcher_extension import WrappersMP
from dydit_pack.dydit_core.checkpoints.adapter import Adapter, save_adapter
from dydit_pack.nodes.adapter import DyDiTAdapterLoader
from dydit_pack.nodes.classes import conditioning
from dydit_pack.nodes.prompt import DyDiTScenePrompt
from safetensors.torch import save_file
from torch import nn


def refusal(call: object, *args: object, **kwargs: object) -> str:
    """The ValueError's sentence: complete, on one line, without the insides of Python."""
    with pytest.raises(ValueError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert re.fullmatch(r"[^\n]{40,500}[.)]", text), text
    assert not re.search(r"object at 0x|tensor\(|NoneType|dydit_core", text), text
    return text


def model_of(transformer: nn.Module) -> SimpleNamespace:
    """As much of a MODEL as the node looks at before it refuses."""
    return SimpleNamespace(get_model_object=lambda name: {"diffusion_model": transformer}[name], get_wrappers=lambda *_: [])


def relative(**changes: object) -> nn.Module:
    """FLUX.2, Chroma and others share FLUX.1's classes, built differently."""
    shape = dict(in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=128, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
                 depth_single_blocks=1, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True, guidance_embed=False, txt_ids_dims=[])
    return comfy.ldm.flux.model.Flux(**{**shape, **changes}, operations=comfy.ops.disable_weight_init, device="meta")


def hunyuan_video() -> nn.Module:
    shape = dict(in_channels=16, out_channels=16, vec_in_dim=64, context_in_dim=128, hidden_size=128, mlp_ratio=4.0, num_heads=1, depth=1,
                 depth_single_blocks=1, axes_dim=[16, 56, 56], theta=256, patch_size=[1, 2, 2], qkv_bias=True, guidance_embed=False, byt5=False,
                 meanflow=False, use_cond_type_embedding=False, vision_in_dim=None, meanflow_sum=False)
    return comfy.ldm.hunyuan_video.model.HunyuanVideo(**shape, operations=comfy.ops.disable_weight_init, device="meta")


def hunyuan_3d() -> nn.Module:
    return comfy.ldm.hunyuan3d.model.Hunyuan3Dv2(hidden_size=128, num_heads=2, depth=1, depth_single_blocks=1,
                                                 operations=comfy.ops.disable_weight_init, device="meta")


@pytest.mark.parametrize("transformer, why", [
    (hunyuan_video(), "HunyuanVideo has FLUX blocks but does not take pictures as FLUX does"),
    (hunyuan_3d(), "Hunyuan3Dv2 has FLUX blocks but does not take pictures as FLUX does"),
    (nn.Linear(2, 2), "Linear is none of FLUX, Latte, DiT."),
    (relative(global_modulation=True, mlp_silu_act=True), "Flux is a FLUX relative whose blocks lack img_mod"),
    (relative(mlp_silu_act=True), "Flux has a gated MLP, which FLUX.1 has not"),
    (relative(depth=0), "Flux has no FLUX blocks"),
], ids=["video", "meshes", "another architecture", "FLUX.2", "gated MLP", "no double blocks"])
def test_a_model_of_another_kind(transformer: nn.Module, why: str) -> None:
    text = refusal(budgeted, model_of(transformer))
    assert text.startswith(f"DyDiT Budget: {why}")
    assert text.endswith("It works on FLUX.1 (dev, schnell, lite) and on DiT, SiT and Latte; take the node out, or set the budget to 1.0.")
    assert budgeted(model_of(transformer), 1.0) is not None  # which is true


@pytest.mark.parametrize("budget", [0.0, 0.19, -1.0, float("nan")])
def test_a_budget_out_of_range(budget: float) -> None:
    assert refusal(budgeted, flux(), budget) == f"DyDiT Budget: budget is {budget}; it must be between 0.2 and 1.0 (0.5 = half the FLOPs)."


@pytest.mark.parametrize("name, value", [("branch_share", 50.0), ("min_keep", 2.0), ("start_percent", -3.0), ("end_percent", 7.0)])
def test_a_linked_value_out_of_range(name: str, value: float) -> None:
    text = refusal(budgeted, flux(), **{name: value})
    assert text.startswith(f"DyDiT Budget: {name} is {value}; it must be between ")
    assert last_trace().facts["lines"] == [text] and last_trace().facts["state"] == "failed", "it stands on the node"


@pytest.mark.parametrize("start, end", [(0.5, 0.5), (0.9, 0.1)])
def test_a_window_that_ends_before_it_starts(start: float, end: float) -> None:
    text = refusal(budgeted, flux(), start_percent=start, end_percent=end)
    assert text == f"DyDiT Budget: start_percent ({start}) must be below end_percent ({end})."


@pytest.mark.parametrize("width, double, single", [(128, DOUBLE, SINGLE), (WIDTH, 2, SINGLE), (WIDTH, DOUBLE, 38)])
def test_an_adapter_of_another_layout(width: int, double: int, single: int) -> None:
    text = refusal(budgeted, flux(), adapter=adapter(width, double, single))
    assert f"width {width} with {double} double and {single} single blocks" in text
    assert f"this model is a FLUX of width {WIDTH} with {DOUBLE} double and {SINGLE} single blocks" in text
    assert text.endswith("Choose the adapter that was made for it, or disconnect the adapter.")


def test_a_learned_method_without_an_adapter() -> None:
    text = refusal(budgeted, flux(), method="learned tokens")
    assert text == 'DyDiT Budget: "learned tokens" needs a trained router; connect a DyDiT Adapter Loader, or the adapter output of the DyDiT Checkpoint Loader, or choose "changed tokens".'


@pytest.mark.parametrize("method", ["auto", "changed tokens", "alternate steps"])
def test_nothing_in_place_of_a_token_without_an_adapter(method: str) -> None:
    assert 'set substitute to "reuse", or method to "learned tokens" with an adapter' in refusal(budgeted, flux(), method=method, substitute="nothing")


@pytest.mark.parametrize("patch", ["attn1_patch", "attn1_output_patch", "post_input"])
def test_another_nodes_patch_on_tokens_or_attention(patch: str) -> None:
    """It may come before or after our node, so it is seen when sampling starts; nothing has run by then."""
    model = budgeted(flux(), 0.5)
    model.set_model_patch(lambda *args, **kwargs: args[0], patch)
    text = refusal(sample, model, 2)
    assert f"({patch})" in text and text.endswith("Take that node out, or set the budget to 1.0.")
    assert last_trace().facts["lines"] == [text] and not last_trace().evaluations, "nothing ran, and the node says why"
    assert not [block for block in blocks(flux()) if "forward" in block.__dict__]


def test_another_nodes_forward_of_a_block() -> None:
    """Seen where the host will put it, before anything is loaded; gone as soon as that node is out."""
    key = f"diffusion_model.single_blocks.{SINGLE - 1}.forward"
    model = flux().clone()
    model.add_object_patch(key, partial(model.get_model_object(key)))
    expected = sample(budgeted(flux(), 0.5), 2)
    for node in (budgeted(model, 0.5), budgeted(flux(), 0.5)):
        node.add_object_patch(key, model.object_patches[key])  # before our node or after it
        text = refusal(sample, node, 2)
        assert text == (
            f"DyDiT Budget: another node replaced the forward of single_blocks.{SINGLE - 1}, which token skipping would put "
            "aside. Take that node out, or set the budget to 1.0.")
    assert last_trace().facts["lines"] == [text] and not last_trace().evaluations, "nothing ran, and the node says why"
    sample(model, 1)  # without our node: the host leaves the patch on the module until another clone is loaded
    assert torch.equal(sample(budgeted(flux(), 0.5), 2), expected)
    del blocks(flux())[-1].__dict__["forward"]  # the host puts back the method, as an attribute


def test_another_pack_that_adds_tokens() -> None:
    """A wrapper around the model may change what it runs on; then no token's place is known."""
    def taller(executor: object, x: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        return executor(torch.cat((x, x), dim=2), *args, **kwargs)[:, :, : x.shape[2]]

    model = budgeted(flux(), 0.5)
    model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", taller)
    text = refusal(sample, model, 2)
    assert "runs on 128 image tokens where 64 were expected; another node adds or removes tokens" in text
    assert not [block for block in blocks(flux()) if "forward" in block.__dict__]


@pytest.mark.parametrize("socket", ["positive", "negative"])
def test_a_prompt_of_another_model(socket: str) -> None:
    """A class label, or what another text encoder made; nothing has run by then."""
    encoded = [[torch.zeros(1, TEXT, 2 * CONTEXT), {"pooled_output": torch.zeros(1, 64)}]]
    made = f"a prompt that was made for another model ({2 * CONTEXT} numbers a token, and this one takes {CONTEXT}); connect one from this model's own text encoder."
    drawn = "a class, and this model draws prompts; take DyDiT Class Label out and connect a prompt."
    for other, why in ((conditioning(3), drawn), (encoded, made)):
        text = refusal(sample, budgeted(flux(), 0.5), 2, 2.0, **{socket: other})
        assert text == f"DyDiT Budget: {socket} has {why}"
        assert text in last_trace().facts["lines"] and not last_trace().evaluations


@pytest.fixture
def adapters() -> Path:
    """The folder that the loader reads, set up as when the pack loads."""
    asyncio.run(dydit_pack.comfy_entrypoint())
    folder = Path(folder_paths.get_folder_paths("dydit")[0])
    assert folder == Path(folder_paths.models_dir) / "dydit"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def load(name: str) -> Adapter:
    return as_node(DyDiTAdapterLoader).EXECUTE_NORMALIZED(adapter_name=name).result[0]


def test_an_adapter_that_is_good(adapters: Path) -> None:
    save_adapter(adapters / "good.safetensors", adapter())
    assert "good.safetensors" in folder_paths.get_filename_list("dydit")
    loaded = load("good.safetensors")
    assert torch.equal(loaded.scores.weight, adapter().scores.weight)
    assert torch.equal(sample(budgeted(flux(), adapter=loaded), 3), sample(budgeted(flux(), adapter=adapter()), 3))


def test_an_adapter_that_is_replaced_is_read_again(adapters: Path) -> None:
    path = adapters / "replaced.safetensors"
    save_adapter(path, adapter())
    marks = [as_node(DyDiTAdapterLoader).fingerprint_inputs(adapter_name=path.name)]
    os.utime(path, (1, 1))
    assert as_node(DyDiTAdapterLoader).fingerprint_inputs(adapter_name=path.name) != marks[0]


def test_an_adapter_that_is_gone(adapters: Path) -> None:
    text = refusal(load, "gone.safetensors")
    assert text == "DyDiT Adapter Loader: gone.safetensors is not in models/dydit; put the file there and press R."


def test_a_path_out_of_the_folder(adapters: Path) -> None:
    """An API client may send any string."""
    save_adapter(adapters.parent / "outside.safetensors", adapter())
    assert "is not in models/dydit" in refusal(load, "../outside.safetensors")


def _truncated(path: Path) -> None:
    save_adapter(path, adapter())
    path.write_bytes(path.read_bytes()[:-100])


FILES = {
    "truncated": (_truncated, "is damaged", "download it again"),
    "renamed .pt": (lambda path: torch.save({"weight": torch.zeros(2)}, path), "is a PyTorch file", "choose the .safetensors"),
    "a web page": (lambda path: path.write_text("<!doctype html>" * 9), "is not a safetensors file", "download it again"),
    "a LoRA": (lambda path: save_file({"lora_down.weight": torch.zeros(4, 8)}, path), "no DyDiT adapter", "made for DyDiT"),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_adapter_that_is_none(kind: str, adapters: Path) -> None:
    make, problem, remedy = FILES[kind]
    path = adapters / f"{kind.replace(' ', '_')}.safetensors"
    make(path)
    text = refusal(load, path.name)
    assert path.name in text and problem in text and remedy in text and str(adapters) not in text


def encode(prompt: str) -> list:
    return as_node(DyDiTScenePrompt).EXECUTE_NORMALIZED(prompt=prompt).result[0]


def test_words_that_the_demo_does_not_know() -> None:
    assert '"zebra"' in refusal(encode, "a red zebra on the left")
    assert 'does not know "zebra", "quasar" and "gothic".' in refusal(encode, "a zebra and a quasar, gothic")


def test_the_example_on_the_node_is_understood() -> None:
    (field,) = DyDiTScenePrompt.define_schema().inputs
    assert field.default in field.tooltip
    for prompt in (field.default, ""):
        ((context, extra),) = encode(prompt)
        assert context.shape == (1, 16, 128) and extra["pooled_output"].shape == (1, 64)
    run = {"positive": encode(field.default), "negative": encode("")}
    assert torch.isfinite(sample(budgeted(flux(), 0.6), 3, 2.0, **run)).all()
