"""Skipped work, over the host's classes and weights, is what the dense model gives with those tokens masked."""

from __future__ import annotations

import re

import pytest
import torch
from arrangements import LORA, nothing_fits, quantised, with_bypass_lora, with_lora  # first: starts the host
from masking import check_against_masked
from tiny import BLOCKS, IMAGE, TEXT, adapter, blocks, budgeted, flux, flux_file, last_trace, load_flux, prompt, put_back, sample, transformer, wide_adapter

import comfy.sd
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor
from dydit_pack.dydit_core.gather import take_lines
from dydit_pack.dydit_core.layouts import Layouts
from dydit_pack.dydit_core.parts import Lines
from dydit_pack.dydit_core.trace import Trace
from dydit_pack.nodes import host
from dydit_pack.nodes.model import BACKEND
from safetensors.torch import load_file
from torch import nn


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


def test_a_lora_that_is_applied_at_each_use() -> None:
    """With weights left out of memory the picture is the one of the merged LoRA, through slices as through layers."""
    merged = sample(budgeted(with_lora(flux()), 0.55), 4)
    with nothing_fits():
        model = with_lora(load_flux())
        found = check_against_masked(model, {"steps": 4}, True)
        linear = transformer(model).single_blocks[0].linear1
        assert linear.weight_function, "the LoRA was merged, so this test tests nothing"
        with BACKEND.weights(linear, torch.zeros(1, 256)) as layer:
            assert not torch.equal(layer.weight, linear.weight) and layer.bias.shape == (layer.weight.shape[0],)
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
    assert isinstance(linear.weight, QuantizedTensor) and BACKEND.unsliceable(linear) is None
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
    whole = (f"linear1 of 2 blocks: computed on every token because its layers are ForeignLinear of {__name__}, which only run whole; "
             "that raises the floor.")
    assert [whole in lines for lines in running] == [False, True]
    floors = [float(re.search(r"floor ([\d.]+) %", lines)[1]) for lines in running]
    assert floors[1] > floors[0] + 5


def test_a_forward_that_another_node_put_on_a_layer_is_called() -> None:
    """As a bypass LoRA does: the layer's weight alone would leave its part out. Once it is gone the layer is cut again."""
    linear = transformer(flux()).get_submodule(LORA[-1])
    assert BACKEND.unsliceable(linear) is None
    model, seen = with_bypass_lora(flux()), []
    hook = transformer(flux()).img_in.register_forward_hook(lambda *_: seen.append(BACKEND.unsliceable(linear)))
    sample(budgeted(model), 1)
    sample(budgeted(flux()), 1)
    hook.remove()
    assert seen == ["another node works inside its layers", None]
    assert "forward" in vars(linear), "the host leaves nothing there any more"
    put_back(flux())


def pieces(linear: nn.Module) -> dict[str, tuple[Lines, Lines]]:
    """Rows and columns, as a token gate, a width that fits the scaled product's tiles, and one that does not."""
    rows, columns = linear.out_features, linear.in_features
    return {"rows": (((rows // 2, rows),), ((0, columns),)), "both": (((16, 32), (48, 64)), ((0, 16), (columns - 32, columns))),
            "odd": (((1, 2), (5, 7)), ((0, 1), (3, 4)))}


@pytest.mark.parametrize("scaled", [False, True], ids=["full precision", "scaled product"])
@pytest.mark.parametrize("format", ["float8_e4m3fn", "float8_e5m2"])
def test_a_scaled_weight_is_cut_as_it_is_stored(format: str, scaled: bool) -> None:
    """The same numbers as the whole layer's, with those rows picked, where the other inputs are zero."""
    linear = transformer(quantised(format)).single_blocks[0].linear1
    linear._full_precision_mm = not scaled
    x = torch.randn(2, 8, linear.in_features, generator=torch.Generator().manual_seed(1))
    for kind, (rows, columns) in pieces(linear).items():
        only = torch.zeros_like(x)
        for start, stop in columns:
            only[..., start:stop] = x[..., start:stop]
        expected = take_lines(linear(only), -1, rows)
        with BACKEND.weights(linear, x) as layer:
            assert layer.weight.dtype == getattr(torch, format), "the weight was unpacked"
            weight, bias = Layouts().cut("a", layer.weight, layer.bias, rows, columns)
            found = layer.product(take_lines(x, -1, columns), weight, bias)
        # Where the shape fits no tile the input is not rounded to fp8, which the whole layer does.
        torch.testing.assert_close(found, expected, rtol=0, atol=0.3 if scaled and kind == "odd" else 1e-5)


@pytest.mark.parametrize("format, cut", [("float8_e4m3fn", True), ("int8_tensorwise", False), ("nvfp4", False), ("mxfp8", False)])
def test_the_floor_is_that_of_the_layers_that_can_be_cut(format: str, cut: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict] = []
    monkeypatch.setattr(host, "send", lambda kind, payload: said.append(payload))
    for model in (flux(), quantised(format)):
        sample(budgeted(model, 0.5, adapter=wide_adapter(), substitute="nothing"), 1)
    plain, packed = (status["lines"] for status in said if status["state"] == "running")
    floors = [float(re.search(r"floor ([\d.]+) %", lines[0])[1]) for lines in (plain, packed)]
    whole = [line for line in packed if "raises the floor" in line]
    if cut:
        assert floors[1] == floors[0] and not whole
    else:
        assert floors[1] > floors[0] + 20
        assert whole == [
            f"linear1 of 2 blocks: computed on every token because its weights are packed as {format}; that raises the floor.",
            "img_attn.proj of 1 block, img_attn.qkv of 1 block, img_mlp.0 of 1 block, img_mlp.2 of 1 block, linear1 of 2 blocks, linear2 of 2 blocks, "
            f"txt_attn.proj of 1 block, txt_attn.qkv of 1 block: computed at full width because its weights are packed as {format}; that raises the floor."]
