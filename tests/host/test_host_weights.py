"""Skipped work, over the host's classes and weights, is what the dense model gives with those tokens masked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from masking import check_against_masked  # first: starts the host
from tiny import BLOCKS, IMAGE, TEXT, adapter, blocks, budgeted, flux, flux_file, last_trace, load_flux, prompt, sample, transformer

import comfy.quant_ops
import comfy.sd
from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.trace import Trace
from dydit_pack.nodes import host
from dydit_pack.nodes.host import BACKEND
from safetensors.torch import load_file

LORA = ("double_blocks.0.img_mlp.0", "double_blocks.0.img_attn.qkv", "single_blocks.0.linear1", "single_blocks.1.linear2")


def with_lora(model: ModelPatcher, strength: float = 1.0) -> ModelPatcher:
    """`model` after a LoRA loader: rank 4 on an MLP, an attention and both fused layers."""
    generator = torch.Generator().manual_seed(9)
    patched, patches = model.clone(), {}
    for name in LORA:
        key = f"diffusion_model.{name}.weight"
        rows, columns = model.model.state_dict()[key].shape
        up, down = torch.randn(rows, 4, generator=generator), torch.randn(4, columns, generator=generator)
        patches[key] = ("diff", (0.01 * up @ down,))
    assert set(patched.add_patches(patches, strength)) == set(patches)
    return patched


@contextmanager
def nothing_fits(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every layer is left out of memory, as on a card that is too small: LoRAs are then applied at each use."""
    load = ModelPatcher.load

    def low(self: ModelPatcher, device: object = None, lowvram_model_memory: int = 0, force_patch_weights: bool = False,
            full_load: bool = False) -> None:
        load(self, device, 1, force_patch_weights, False)

    with monkeypatch.context() as patch:
        patch.setattr(ModelPatcher, "load", low)
        yield


def unequal(trace: Trace) -> bool:
    """Some token was skipped in one block and computed in another, at the same step."""
    return any((mask.any(0) & ~mask.all(0)).any() for mask in (evaluation.mask() for evaluation in trace.evaluations))


METHODS = {
    "changed tokens × reuse": {},
    "learned tokens × reuse": {"adapter": adapter(), "substitute": "reuse"},
    "learned tokens × nothing": {"adapter": adapter(), "substitute": "nothing"},
}


@pytest.mark.parametrize("cfg", [1.0, 3.0])
@pytest.mark.parametrize("method", METHODS)
def test_a_run_is_the_dense_model_masked_by_its_trace(method: str, cfg: float) -> None:
    check_against_masked(flux(), {"steps": 4, "cfg": cfg, "batch": 2}, "reuse" in method, **METHODS[method])
    trace = last_trace()
    assert trace.evaluations[0].shape == (BLOCKS, 4 if cfg > 1 else 2, IMAGE)
    assert "learned" not in method or unequal(trace)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_run_in_half_precision(dtype: torch.dtype, method: str) -> None:
    """As FLUX is used. The run computes in `dtype`, whatever the host would take on the CPU."""
    model = load_flux(dtype)
    model.set_model_compute_dtype(dtype)
    seen: set[torch.dtype] = set()
    hook = blocks(model)[0].register_forward_pre_hook(lambda module, args, kwargs: seen.add(kwargs["img"].dtype), with_kwargs=True)
    check_against_masked(model, {"steps": 4, "cfg": 3.0}, "reuse" in method, tolerance=0.05, **METHODS[method])
    hook.remove()
    assert seen == {dtype}


def test_a_run_with_unequal_branches() -> None:
    check_against_masked(flux(), {"steps": 4, "cfg": 3.0}, True, branch_share=2.0)
    mask = last_trace().evaluations[-1].mask().mean((0, 2))  # rows: uncond, then cond
    assert mask[1] == pytest.approx(2 * mask[0], rel=0.1)


@pytest.mark.parametrize("rows", [1, 2])
def test_attention_masks_follow_the_kept_queries(rows: int) -> None:
    """Regional prompts: each query has a row of the mask, whether the mask has batch rows or not."""
    tokens = TEXT + IMAGE
    mask = torch.randn(rows, tokens, tokens, generator=torch.Generator().manual_seed(2)) * 2
    run = {"steps": 3, "batch": 2, "positive": prompt(1, attention_mask=mask, attention_mask_img_shape=(8, 8))}
    assert not torch.allclose(sample(flux(), **run), sample(flux(), 3, batch=2), atol=0.05)
    check_against_masked(flux(), run, True)


def test_reference_latents_are_tokens_too() -> None:
    reference = torch.randn(1, 16, 12, 8, generator=torch.Generator().manual_seed(2))
    check_against_masked(flux(), {"steps": 3, "positive": prompt(1, reference_latents=[reference])}, True)
    assert last_trace().evaluations[0].shape == (BLOCKS, 1, IMAGE + 24)
    assert last_trace().evaluations[0].mean_map().shape == (8, 8)  # the map shows the picture, not the reference


def test_a_lora_that_is_merged() -> None:
    model = with_lora(flux())
    found = check_against_masked(model, {"steps": 4}, True)
    assert (found - sample(budgeted(flux(), 0.55), 4)).abs().max() > 0.05


def test_a_lora_that_is_applied_at_each_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """With weights left out of memory the picture is the one of the merged LoRA, through slices as through layers."""
    merged = sample(budgeted(with_lora(flux()), 0.55), 4)
    with nothing_fits(monkeypatch):
        model = with_lora(load_flux())
        found = check_against_masked(model, {"steps": 4}, True)
        linear = transformer(model).single_blocks[0].linear1
        assert linear.weight_function, "the LoRA was merged, so this test tests nothing"
        with BACKEND.weights(linear, torch.zeros(1, 256)) as (weight, bias):
            assert not torch.equal(weight, linear.weight) and bias.shape == (weight.shape[0],)
    torch.testing.assert_close(found, merged, rtol=1e-4, atol=1e-4 * float(merged.abs().max()))


@pytest.mark.parametrize("lora", [False, True])
def test_weights_stored_in_fp8(lora: bool) -> None:
    """weight_dtype fp8_e4m3fn: cast at each use, so slices must be cast like the layers."""
    model = load_flux(torch.float8_e4m3fn)
    assert transformer(model).single_blocks[0].linear1.weight.dtype == torch.float8_e4m3fn
    assert BACKEND.unsliceable(transformer(model).single_blocks[0].linear1) is None
    check_against_masked(with_lora(model) if lora else model, {"steps": 3, "cfg": 2.0}, True)


def scaled_fp8_flux() -> ModelPatcher:
    """A file with fp8 weights and a scale for each, as many FLUX files are published."""
    tensors = {"scaled_fp8": torch.zeros(0, dtype=torch.float8_e4m3fn)}
    for key, value in load_file(flux_file()).items():
        if key.startswith(("double_blocks", "single_blocks")) and key.endswith(".weight") and value.ndim == 2:
            scale = value.abs().max() / 448
            tensors[key], tensors[key.replace(".weight", ".scale_weight")] = (value / scale).to(torch.float8_e4m3fn), scale
        else:
            tensors[key] = value
    return comfy.sd.load_diffusion_model_state_dict(tensors)


@pytest.mark.parametrize("method", METHODS)
def test_weights_quantised_with_a_scale(method: str) -> None:
    model = scaled_fp8_flux()
    linear = transformer(model).single_blocks[0].linear1
    assert isinstance(linear.weight, comfy.quant_ops.QuantizedTensor) and BACKEND.unsliceable(linear)
    check_against_masked(model, {"steps": 3, "cfg": 2.0}, "reuse" in method, **METHODS[method])


def test_layers_of_another_pack_run_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF and quantised layers keep their own forward: right pictures, a higher floor, and a sentence that says so."""
    said: list[dict] = []
    monkeypatch.setattr(host, "send", lambda kind, payload: said.append(payload))
    model = load_flux()
    check_against_masked(model, {"steps": 4}, True)

    class ForeignLinear(type(transformer(model).single_blocks[0].linear1)):
        pass

    for block in transformer(model).single_blocks:
        block.linear1.__class__ = ForeignLinear
    check_against_masked(model, {"steps": 4}, True)
    running = [" ".join(status["lines"]) for status in said if status.get("state") == "running"]
    assert [f"ForeignLinear of {__name__}" in lines for lines in running] == [False, True]
    floors = [float(re.search(r"floor ([\d.]+) %", lines)[1]) for lines in running]
    assert floors[1] > floors[0] + 5


def test_a_forward_that_another_node_put_on_a_layer_is_called() -> None:
    """As a bypass LoRA does: the layer's weight alone would leave its part out."""
    linear = blocks(flux())[-1].linear1
    assert BACKEND.unsliceable(linear) is None
    linear.forward = linear.forward
    try:
        assert BACKEND.unsliceable(linear) == "another node works inside its layers"
    finally:
        del linear.forward
