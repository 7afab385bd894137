"""What works beside DyDiT Budget on a graph, and what is refused: each row of docs/composition.md runs.

`test_host_composition_table.py` runs every case; `DYDIT_WRITE_DOCS=1` with it writes the table.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from arrangements import (Graph, after, block_replaced, class_patched, controlled, inpainted, masked_prompts, noise, nothing_fits, of_another_class, of_another_loader, on_two_cards, packed_layers,
                          patched, patched_by_a_hook, quantised, references, regional_mask, scheduled_lora, sharper_attention, with_bypass_lora, with_forward, with_lora)
from hosting import PACK
from masking import check_against_masked
from tiny import budgeted, flux, last_trace, load_flux, prompt, sample, transformer, wide_adapter

import comfy.multigpu
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_cfg import CFGZeroStar
from comfy_extras.nodes_context_windows import ContextWindowsManualNode
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
from comfy_extras.nodes_flux import FluxKVCache
from comfy_extras.nodes_model_advanced import ModelSamplingFlux, RescaleCFG
from comfy_extras.nodes_nag import NAGuidance
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict

PAGE = PACK / "docs" / "composition.md"
NOTHING_ELSE = "Take that node out, or set the budget to 1.0."


@cache
def ways() -> dict[str, tuple[dict, bool]]:
    """How the node is set, and whether a skipped token reuses."""
    return {"changed tokens": ({}, True), "adapter": ({"adapter": wide_adapter(), "substitute": "nothing"}, False)}


@dataclass(frozen=True)
class Case:
    """A row. `check` gets the node's settings and whether they reuse; it gives the sentence of a refusal."""

    part: str
    thing: str
    refused: bool
    words: str
    check: Callable[[dict, bool], str | None]


def works(part: str, thing: str, arrange: Callable[[], Graph], words: str = "", tolerance: float = 2e-4, idle: bool = False,
          traced: bool = True, **run: object) -> Case:
    """Its picture equals that of the dense model beside the same thing, masked; `idle`: which that thing leaves as it is.

    `traced`: as of `check_against_masked`.
    """
    def check(settings: dict, reuse: bool) -> None:
        graph = arrange()
        plain = {"steps": 5, **run}
        with graph.under():
            check_against_masked(graph.model, {**plain, **graph.run}, reuse, tolerance, traced, **settings)
            assert torch.equal(sample(graph.model, **{**plain, **graph.run}), sample(flux(), **plain)) == idle

    return Case(part, thing, False, words, check)


def refused(part: str, thing: str, arrange: Callable[[], Graph], sentence: str) -> Case:
    """The sentence comes before anything is computed."""
    def check(settings: dict, reuse: bool) -> str:
        graph = arrange()
        last = getattr(transformer(graph.model), "final_layer", torch.nn.Identity())
        hook = last.register_forward_hook(lambda *_: pytest.fail("a step was computed"))
        with pytest.raises(ValueError) as caught, graph.under():
            sample(budgeted(graph.model, 0.55, **settings), **{"steps": 3, **graph.run})
        hook.remove()
        return str(caught.value)

    return Case(part, thing, True, sentence, check)


def compiled(model: ModelPatcher) -> ModelPatcher:
    """The stock node, with dynamo's own backend: graphs, guards and breaks are real, the code generator is left out."""
    model = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return model


def check_compiled(settings: dict, reuse: bool) -> None:
    """The slider moves, the node is taken out and put back; each picture is the one without compile."""
    torch._dynamo.reset()
    base = compiled(flux())
    for budget in (0.5, 0.8, None, 0.5, 1.0):
        found, expected = (model if budget is None else budgeted(model, budget, **settings) for model in (base, flux()))
        torch.testing.assert_close(sample(found), sample(expected), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def check_chained(settings: dict, reuse: bool) -> None:
    found = sample(budgeted(budgeted(flux(), 0.8, node="1"), 0.55, node="2", **settings))
    assert last_trace().facts["node"] == "2"
    assert torch.equal(found, sample(budgeted(flux(), 0.55, **settings)))


def check_two_samplers(settings: dict, reuse: bool) -> None:
    node = budgeted(flux(), 0.6, **settings)
    for run in ({"seed": 5}, {"seed": 6, "size": (12, 20)}, {"seed": 6}):
        assert torch.equal(sample(node, **run), sample(budgeted(flux(), 0.6, **settings), **run))


def check_split_steps(settings: dict, reuse: bool) -> None:
    """KSampler (Advanced): one goes on where another left off; each is a run with a budget of its own."""
    half = {"steps": 8, "last_step": 4, "force_full_denoise": False}
    latent = check_against_masked(flux(), half, reuse, **settings)
    check_against_masked(flux(), {"steps": 8, "start_step": 4, "latent": latent, "noisy": True}, reuse, **settings)


def check_one_card(settings: dict, reuse: bool) -> None:
    model = comfy.multigpu.create_multigpu_deepclones(flux(), 2)
    assert torch.equal(sample(budgeted(model, 0.55, **settings)), sample(budgeted(flux(), 0.55, **settings)))


def lowvram(model: ModelPatcher) -> Graph:
    return Graph(model, under=nothing_fits)


_WHOLE = ("multiplied whole: the first fused layer of a single block for every token, and all of them at full width. The floor is higher, "
          "and the node says so.")
_PACKED = f"Its layers are {_WHOLE}"
_CUT = ("Rows and columns keep the weight's one scale. Products stay in fp8 where the card has them and a cut's sizes are multiples of 16; "
        "else the cut is unpacked first.")
_PASS = "Its extra pass is dense and not counted. What was skipped in the first pass counts as guidance too, times the scale: keep the budget high."

CASES = [
    works("Weights", "LoRA", lambda: Graph(with_lora(flux()))),
    works("Weights", "Several LoRAs", lambda: Graph(with_lora(with_lora(flux(), 0.7), -0.5, seed=40)), cfg=3.0, batch=2),
    works("Weights", "LoRA on a card that is too small (lowvram)", lambda: lowvram(with_lora(load_flux()))),
    works("Weights", "Offloaded weights (lowvram)", lambda: lowvram(load_flux(torch.bfloat16)), "Transfers stay: whole weights are brought to the card."),
    works("Weights", "Load LoRA (Bypass)", lambda: Graph(with_bypass_lora(flux())), f"The layers that it works in are {_WHOLE}"),
    works("Weights", "Scheduled LoRA (Create Hook LoRA, keyframes)", scheduled_lora, "Weights are cut anew for every step."),
    works("Weights", "fp8 weights (weight_dtype fp8_e4m3fn)", lambda: Graph(load_flux(torch.float8_e4m3fn)),
          "With a fast mode (fp8_e4m3fn_fast) cut layers multiply in the compute type.", cfg=3.0, batch=2),
    works("Weights", "fp8 with a scale (float8_e4m3fn)", lambda: Graph(quantised("float8_e4m3fn")), _CUT, cfg=3.0, batch=2),
    works("Weights", "fp8 with a scale (float8_e5m2)", lambda: Graph(quantised("float8_e5m2")), _CUT),
    works("Weights", "fp8 with a scale, and a LoRA", lambda: Graph(with_lora(quantised("float8_e4m3fn")))),
    works("Weights", "fp8 with a scale, and a bypass LoRA", lambda: Graph(with_bypass_lora(quantised("float8_e4m3fn"))), "The LoRA's layers are multiplied whole."),
    works("Weights", "int8 (int8_tensorwise)", lambda: Graph(quantised("int8_tensorwise")),
          _PACKED, tolerance=2e-3),
    works("Weights", "nvfp4", lambda: Graph(quantised("nvfp4")), _PACKED),
    works("Weights", "mxfp8", lambda: Graph(quantised("mxfp8")), _PACKED),
    works("Weights", "GGUF", lambda: Graph(packed_layers()), _PACKED + " Tested with a stand-in for its layer, and once by hand beside ComfyUI-GGUF (Q8_0 and Q4_0, with LoRA and bypass LoRA).", cfg=3.0, batch=2),
    refused("Weights", "Nunchaku", of_another_loader,
            "DyDiT Budget: ComfyFluxWrapper is none of FLUX, Latte, DiT. It works on "
            "FLUX.1 (dev, schnell, lite) and on DiT, SiT and Latte; take the node out, or set the budget to 1.0."),
    Case("Running", "TorchCompileModel", False, "Also where the slider is moved, and the node taken out and put back.", check_compiled),
    Case("Running", "MultiGPU CFG Split, one card", False, "The node does nothing there.", check_one_card),
    refused("Running", "MultiGPU CFG Split, several cards", on_two_cards,
            f"DyDiT Budget: MultiGPU CFG Split runs the branches on several cards at once, and a budget is kept on one. {NOTHING_ELSE}"),
    works("Running", "EasyCache", lambda: after(EasyCacheNode, 0.3, 0.15, 0.95, False),
          "A step that it skips costs nothing, so the others may cost more.", steps=8),
    works("Running", "LazyCache", lambda: after(LazyCacheNode, 0.3, 0.15, 0.95, False), "The same.", steps=8),
    works("Running", "Another attention (override: sage, flash, Model Sparse Attention)", sharper_attention,
          "It gets the queries of the kept tokens, and every key. Tested with an override of our own; Model Sparse Attention is not in ComfyUI 0.33."),
    refused("Running", "Another node's forward of a block", lambda: with_forward("single_blocks.1"),
            f"DyDiT Budget: another node replaced the forward of single_blocks.1, which token skipping would put aside. {NOTHING_ELSE}"),
    refused("Running", "Another node's forward of an MLP", lambda: with_forward("double_blocks.0.img_mlp"),
            f"DyDiT Budget: another node replaced the forward of double_blocks.0.img_mlp, which token skipping would put aside. {NOTHING_ELSE}"),
    *(refused("Running", thing, arrange,
              f"DyDiT Budget: another node replaced the forward of double_blocks.0, which token skipping would put aside. {NOTHING_ELSE}")
      for thing, arrange in (("Another pack's class for a block (XLabs)", of_another_class), ("Another pack's patch of ComfyUI's block class", class_patched))),
    works("Running", "Another node's forward of a linear layer", lambda: with_forward("single_blocks.1.linear1"), "That layer is multiplied whole."),
    works("Prompts", "ControlNet", controlled, "The ControlNet itself is not counted."),
    works("Prompts", "Reference images (Kontext), offset", lambda: references("offset"), "Their tokens are skipped like the picture's."),
    works("Prompts", "Reference images on the positive prompt alone", lambda: Graph(flux(), {
        "cfg": 3.0, "positive": prompt(1, reference_latents=[noise(1, 16, 12, 8)])}), "The map shows the picture alone.", traced=False),
    works("Prompts", "Reference images, index", lambda: references("index")),
    works("Prompts", "Reference images, uxo", lambda: references("uxo")),
    refused("Prompts", "Reference images, index_timestep_zero", lambda: references("index_timestep_zero"),
            "DyDiT Budget: this graph modulates reference images at another timestep (index_timestep_zero), which token skipping does not support yet. Use "
            "another reference method, or set the budget to 1.0."),
    works("Prompts", "Regional prompts (attention mask)", regional_mask),
    works("Prompts", "Conditioning (Set Mask)", masked_prompts),
    works("Prompts", "Conditioning (Set Area)", lambda: Graph(flux(), {"positive": [*prompt(1), *prompt(3, area=(8, 16, 8, 0))]}),
          "The map shows the passes over the whole picture.", traced=False),
    works("Prompts", "Blocks replaced (`patches_replace`: IP-Adapter, PuLID)", block_replaced, "The block that they call is the budgeted one."),
    *(refused("Prompts", f"Attention or token patches (`{name}`{of})", partial(patched, name),
              f"DyDiT Budget: another node patches this model's attention or tokens ({name}), which cannot be combined with token skipping yet. {NOTHING_ELSE}")
      for name, of in (("attn1_patch", ": ToMe, hypernetworks"), ("attn1_output_patch", ": older IP-Adapters"), ("post_input", ": USO"))),
    refused("Prompts", "FLUX KV Cache", lambda: after(FluxKVCache),
            "DyDiT Budget: another node patches this model's attention or tokens (attn1_patch, post_input), which cannot be combined with token "
            f"skipping yet. {NOTHING_ELSE}"),
    refused("Prompts", "The same patches, from a hook on a prompt", patched_by_a_hook,
            "DyDiT Budget: another node patches this model's attention or tokens (attn1_output_patch), which cannot be combined with token "
            f"skipping yet. {NOTHING_ELSE}"),
    works("Guidance", "Skip Layer Guidance (DiT)", lambda: after(SkipLayerGuidanceDiT, 2.0, 0.0, 1.0, "", "1"), _PASS),
    works("Guidance", "Perturbed-Attention Guidance", lambda: after(PerturbedAttentionGuidance, 1.0), _PASS + " On FLUX the node does nothing else.", idle=True),
    works("Guidance", "CFG-Zero*", lambda: after(CFGZeroStar), cfg=3.0),
    works("Guidance", "RescaleCFG", lambda: Graph(RescaleCFG().patch(flux(), 0.7)[0]), cfg=3.0),
    refused("Guidance", "Normalized Attention Guidance", lambda: after(NAGuidance, 5.0, 0.25, 2.5),
            "DyDiT Budget: another node patches this model's attention or tokens (attn1_output_patch), which cannot be combined with token "
            f"skipping yet. {NOTHING_ELSE}"),
    works("Sampling", "ModelSamplingFlux and other shifts", lambda: Graph(ModelSamplingFlux().patch(flux(), 1.6, 0.5, 1024, 1024)[0])),
    works("Sampling", "Inpainting mask", lambda: Graph(flux(), inpainted())),
    works("Sampling", "Differential Diffusion", lambda: Graph(after(DifferentialDiffusion, 1.0).model, inpainted())),
    works("Sampling", "Image to image (denoise below 1)", lambda: Graph(flux(), {"latent": noise(1, 16, 16, 16), "denoise": 0.6})),
    Case("Sampling", "KSampler (Advanced), steps split between two", False, "Each is a run with a budget of its own.", check_split_steps),
    Case("Sampling", "Two samplers on one MODEL", False, "Two runs, each with its own history.", check_two_samplers),
    Case("Sampling", "Two DyDiT Budget nodes, one after the other", False, "The last one counts.", check_chained),
    refused("Sampling", "Context Windows", lambda: after(ContextWindowsManualNode, 10, 4, "standard_static", 1, False, "pyramid", 3, False),
            f"DyDiT Budget: a Context Windows node runs this picture window by window, and a budget is kept on whole pictures. {NOTHING_ELSE}"),
]

_HEAD = """# What works beside it

Made by the tests: `DYDIT_WRITE_DOCS=1 pytest tests/host/test_host_composition_table.py` runs every row on a tiny FLUX in ComfyUI,
twice: with *changed tokens × reuse*, and with an adapter that has token scores, widths and a TD-LoRA. **Works** means: the
picture equals, to rounding, that of the dense model with the same thing on the graph, in which the same tokens, heads and
channels are masked. **Refused** means: the sentence appears, and nothing is computed.

A DiT or SiT goes the same way through the host. On a tiny one LoRAs, weights that do not fit or are in fp8, the stock compile
node and EasyCache are tested as well; ControlNets are refused, with a budget and without, and so are nodes that patch blocks or
attention (Skip Layer Guidance, Perturbed-Attention Guidance, Normalized Attention Guidance, HyperTile, ScaleROPE), for which it has no
place. Where DyDiT Checkpoint Loader has set cfg to three channels, another node that sets how it is computed (RescaleCFG) is refused,
and so is a guider that computes it itself (Perp-Neg, Dual CFG). What works in a pass of its own at some of the steps (Skip Layer Guidance, Perturbed-Attention
Guidance) is refused at the first of them, and never where none of the run's steps is one.

All of it on the CPU. What needs a CUDA card (weights streamed by DynamicVRAM, products in fp8, inductor's code, several cards)
has not been run.
"""


def page() -> str:
    lines = [_HEAD]
    for part in dict.fromkeys(case.part for case in CASES):
        lines += [f"## {part}", "", "| On the graph | Result | In a sentence |", "|---|---|---|"]
        lines += [f"| {case.thing} | {'**refused**' if case.refused else 'works'} | {case.words} |" for case in CASES if case.part == part]
        lines.append("")
    return "\n".join(lines)
