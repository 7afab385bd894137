"""DyDiT Budget on a DiT: the same contracts as on FLUX."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from tiny import adapter, as_node, budgeted, last_trace  # first: starts the host
from tiny_dit import DEPTH, SIDE, WIDTH, config, dit, load_dit, sample, transformer

import comfy.model_management
from arrangements import nothing_fits
from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from counting import block_flops
from dydit_pack.dydit_core.checkpoints.adapter import Adapter, Facts
from dydit_pack.dydit_core.models.dit import EPS, FLOW
from dydit_pack.dydit_core.routers.token import CapacityTable, TokenScores
from dydit_pack.dydit_core.trace import Trace
from dydit_pack.nodes import budget, host
from dydit_pack.nodes.guidance import guide_three
from dydit_pack.nodes.heatmap import DyDiTHeatmap
from dydit_pack.nodes.teacher import refuse

BOTH = pytest.mark.parametrize("prediction", [EPS, FLOW])
TOKENS = (SIDE // 2) ** 2


def test_budget_one_is_the_identity() -> None:
    assert budgeted(dit(), 1.0) is dit()


@BOTH
@pytest.mark.parametrize("method", ["changed tokens", "alternate steps"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_achieved_meets_asked(prediction: str, method: str, cfg: float) -> None:
    sample(budgeted(dit(prediction), 0.6, method=method), 20, cfg)
    trace = last_trace()
    assert abs(trace.facts["achieved"] - 0.6) < 0.02
    assert trace.evaluations[0].shape == (DEPTH, 2 if cfg > 1 else 1, TOKENS) and len(trace.evaluations) == 20


@BOTH
@pytest.mark.parametrize("run", [{"steps": 20, "cfg": 4.0, "batch": 2}, {"steps": 8, "sampler": "heun"}, {"steps": 12, "scheduler": "karras", "sampler": "dpmpp_2m"}],
                         ids=["euler cfg 4", "heun", "dpmpp_2m karras"])
def test_flops_counted_around_a_run(prediction: str, run: dict) -> None:
    with block_flops(dit(prediction)) as dense:
        sample(dit(prediction), **run)
    with block_flops(dit(prediction)) as count:
        sample(budgeted(dit(prediction), 0.6, min_keep=0.0), **run)
    assert count.flops / dense.flops == pytest.approx(0.6, abs=0.02)
    assert last_trace().facts["achieved"] == pytest.approx(count.flops / dense.flops, abs=1e-3)


@contextmanager
def masked(model: ModelPatcher, trace: Trace) -> Iterator[None]:
    """The dense model; what its MLPs give for a token that the trace says was not computed is what they gave last."""
    network, masks, last = transformer(model), iter(trace.evaluations), {}
    now: list[torch.Tensor] = []

    def replace(index: int, module: torch.nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
        last[index] = torch.where(now[0][index, :, :, None], out, last.get(index, out))
        return last[index]

    hooks = [network.x_embedder.register_forward_pre_hook(lambda *_: now.__setitem__(slice(None), [torch.from_numpy(next(masks).mask())]))]
    hooks += [block.mlp.register_forward_hook(partial(replace, index)) for index, block in enumerate(network.blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_against_masked(model: ModelPatcher, run: dict, tolerance: float = 2e-4, **settings: object) -> torch.Tensor:
    found = sample(budgeted(model, 0.6, **settings), **run)
    with masked(model, last_trace()):
        expected = sample(model, **run)
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert (found - sample(model, **run)).abs().max() > 10 * (found - expected).abs().max()  # the tokens that were skipped mattered
    return found


@BOTH
def test_a_run_is_the_dense_model_masked_by_its_trace(prediction: str) -> None:
    check_against_masked(dit(prediction), {"steps": 6, "cfg": 3.0, "batch": 2})
    check_against_masked(guide_three(dit(prediction)), {"steps": 6, "cfg": 3.0}, branch_share=2.0)


def test_weights_that_do_not_fit_or_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = check_against_masked(dit(), {"steps": 4})
    with nothing_fits():
        found = check_against_masked(load_dit(config()), {"steps": 4})
    torch.testing.assert_close(found, plain, rtol=0, atol=1e-4 * float(plain.abs().max()))
    monkeypatch.setattr(comfy.model_management.args, "fp8_e4m3fn_unet", True)
    packed = load_dit(config())
    packed.set_model_compute_dtype(torch.float32)
    check_against_masked(packed, {"steps": 4})


def test_a_window_holds_where_sigmas_are_large() -> None:
    """By parts of sampling, which the node's inputs are; DiT's first sigma is 157."""
    sample(budgeted(dit(EPS), 0.75, start_percent=0.2, end_percent=0.8), 20)
    sampling, evaluations = dit(EPS).get_model_object("model_sampling"), last_trace().evaluations
    start, end = sampling.percent_to_sigma(0.2), sampling.percent_to_sigma(0.8)
    outside = [evaluation for evaluation in evaluations if not end <= evaluation.sigma <= start]
    assert evaluations[0].sigma > 150 and len(outside) == 8 and all(evaluation.flops == 1.0 for evaluation in outside)
    assert last_trace().facts["achieved"] == pytest.approx(0.75, abs=0.02)


def test_nothing_of_a_run_stays() -> None:
    sample(budgeted(dit(), 0.5), 4)
    assert not any("forward" in vars(module) for module in transformer(dit()).modules())
    assert last_trace().blocks == tuple(f"blocks.{index}" for index in range(DEPTH)) and last_trace().facts["size"] == [TOKENS, 1]


def test_another_forward_in_a_block_is_refused_by_name() -> None:
    for name in ("blocks.1", "blocks.1.mlp"):
        model = dit().clone()
        model.add_object_patch(f"diffusion_model.{name}.forward", lambda *args, **kwargs: None)
        with pytest.raises(ValueError, match=rf"another node replaced the forward of {name},"):
            sample(budgeted(model, 0.5), 1)


def test_an_adapter_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match="was made for a FLUX of width 256 with 1 double and 2 single blocks; this model is a DiT/2 of width 64 with 3 blocks"):
        budgeted(dit(), adapter=adapter())


def test_gates_are_not_trained_for_it() -> None:
    with pytest.raises(ValueError, match=r"^DyDiT Train: gates for a DiT-64×3/2 are trained in a shell: python -m dydit_core train --base FILE "):
        refuse(dit())


def test_what_the_node_says_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    for module in (budget, host):
        monkeypatch.setattr(module, "send", lambda kind, event: said.extend(event.get("lines", ())))
    sample(budgeted(dit(), 0.2), 4)
    assert said[0].startswith("At 128 × 128 a step costs at least ")
    assert any("is the least this graph can spend here: attention, a dense first step" in line for line in said) and not any("text" in line for line in said)


@pytest.mark.parametrize("patch", [2, 4])
def test_the_heatmap_lies_on_its_tokens(patch: int) -> None:
    model = budgeted(load_dit(config(patch_size=patch)), 0.6)
    latent = sample(model, 6, 2.0)
    inputs = {"step": 4, "block": 2, "branch": "cond (positive)", "opacity": 1.0}
    _, mask, report = as_node(DyDiTHeatmap).EXECUTE_NORMALIZED(model=model, latent={"samples": latent}, **inputs).result
    side, pixels = SIDE // patch, 8 * patch
    computed = torch.from_numpy(last_trace().evaluations[3].mask())[1, 1].float().unflatten(0, (side, side))
    assert torch.equal(mask[0], computed.repeat_interleave(pixels, 0).repeat_interleave(pixels, 1)) and 0 < computed.mean() < 1
    assert "block 2" in report


def test_under_the_stock_compile_node() -> None:
    """0.5 → node taken out → 0.5: each picture is the one without compile."""
    model = load_dit(config())
    model.cached_patcher_init = (load_dit, (config(),))
    compiled = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    for under, plain in ((budgeted(compiled, 0.5), budgeted(model, 0.5)), (compiled, model), (budgeted(compiled, 0.5), budgeted(model, 0.5))):
        expected = sample(plain, 4)
        torch.testing.assert_close(sample(under, 4), expected, rtol=0, atol=1e-5 * float(expected.abs().max()))
    torch._dynamo.reset()


def trained(prediction: str) -> Adapter:
    """An adapter of our own for the tiny DiT or SiT, untrained: a token router and a table that differs by block and sigma."""
    generator = torch.Generator().manual_seed(3)
    scores = TokenScores(DEPTH, WIDTH, 4, text=False).requires_grad_(False)
    for value in scores.state_dict().values():
        value.copy_(torch.randn(value.shape, generator=generator) * 0.05)
    quantiles = torch.randn(DEPTH, 4, 9, generator=generator).sort(-1).values
    return Adapter(Facts(0, DEPTH, WIDTH, "Ours", kind="DiT/2" if prediction == EPS else "SiT/2"), scores, CapacityTable(quantiles, torch.tensor([0.5, 2.0, 20.0, 160.0])))


@BOTH
@pytest.mark.parametrize("substitute", ["reuse", "nothing"])
def test_an_adapter_of_our_own(prediction: str, substitute: str) -> None:
    run = {"adapter": trained(prediction), "method": "learned tokens", "substitute": substitute}
    sample(budgeted(dit(prediction), 0.7, **run), 20, 2.0)
    trace = last_trace()
    assert trace.facts["achieved"] == pytest.approx(0.7, abs=0.02) and (trace.evaluations[0].computed == 1.0) == (substitute == "reuse")
    if substitute == "reuse":
        check_against_masked(dit(prediction), {"steps": 6, "cfg": 2.0}, **run)
