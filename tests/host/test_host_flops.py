"""Achieved meets asked: FLOPs counted around real sampling runs, against the same run of the untouched model."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from counting import block_flops  # first: starts the host
from tiny import BLOCKS, adapter, budgeted, flux, last_trace, prompt, sample

import comfy.samplers
from dydit_pack.nodes import host

RUNS = {
    "euler 4": {"steps": 4},
    "euler 8 cfg 4": {"steps": 8, "cfg": 4.0},
    "euler 20": {"steps": 20},
    "euler 20 cfg 4": {"steps": 20, "cfg": 4.0},
    "heun 4 cfg 4": {"steps": 4, "cfg": 4.0, "sampler": "heun"},
    "heun 8": {"steps": 8, "sampler": "heun"},
    "heun 20": {"steps": 20, "sampler": "heun"},
    "dpmpp_sde 8": {"steps": 8, "sampler": "dpmpp_sde"},
    "euler 20 denoise .6": {"steps": 20, "denoise": 0.6},
    "euler 12, steps 4 to 10": {"steps": 12, "start_step": 4, "last_step": 10},
    "heun 10, steps 0 to 6": {"steps": 10, "sampler": "heun", "start_step": 0, "last_step": 6, "force_full_denoise": True},
}


@cache
def dense_flops(run: str) -> int:
    with block_flops(flux()) as count:
        sample(flux(), **RUNS[run])
    return count.flops


def spent(run: str, budget: float, **settings: object) -> float:
    """Counted FLOPs of the run under a budget ÷ counted FLOPs without the node; the Trace must say the same."""
    with block_flops(flux()) as count:
        sample(budgeted(flux(), budget, **settings), **RUNS[run])
    fraction = count.flops / dense_flops(run)
    trace = last_trace()
    assert trace.facts["achieved"] == pytest.approx(fraction, abs=1e-3)
    assert count.calls == BLOCKS * len(trace.evaluations)
    return fraction


@pytest.mark.parametrize("run, budget", [(run, budget) for run in RUNS for budget in (0.9, 0.75, 0.5) if budget < 0.9 or "euler" in run])
def test_training_free(run: str, budget: float) -> None:
    assert spent(run, budget, min_keep=0.0) == pytest.approx(budget, abs=0.02)


@pytest.mark.parametrize("run", ["euler 20", "euler 20 cfg 4", "heun 20"])
def test_as_the_node_comes(run: str) -> None:
    """With every advanced input at its default."""
    assert spent(run, 0.6) == pytest.approx(0.6, abs=0.012)
    assert spent(run, 0.6, adapter=adapter(), method="learned tokens") == pytest.approx(0.6, abs=0.012)


@pytest.mark.parametrize("method, budget", [("learned tokens", 0.9), ("learned tokens", 0.5), ("alternate steps", 0.75), ("alternate steps", 0.5)])
@pytest.mark.parametrize("run", ["euler 4", "euler 8 cfg 4", "heun 8", "euler 20 cfg 4"])
def test_other_methods(method: str, run: str, budget: float) -> None:
    settings = {"adapter": adapter(), "substitute": "nothing"} if method == "learned tokens" else {"min_keep": 0.0}
    assert spent(run, budget, method=method, **settings) == pytest.approx(budget, abs=0.02)


@pytest.mark.parametrize("run", ["euler 20", "heun 8", "dpmpp_sde 8"])
@pytest.mark.parametrize("budget", [0.75, 0.5])
def test_inside_a_window(run: str, budget: float) -> None:
    """Steps outside count as dense, so those inside do with less; as an average the budget still holds."""
    assert spent(run, budget, start_percent=0.1, end_percent=0.9, min_keep=0.0) == pytest.approx(budget, abs=0.02)
    start, end = (flux().get_model_object("model_sampling").percent_to_sigma(percent) for percent in (0.1, 0.9))
    outside = {evaluation.flops for evaluation in last_trace().evaluations if not end <= evaluation.sigma <= start}
    inside = [evaluation.flops for evaluation in last_trace().evaluations if end <= evaluation.sigma <= start]
    assert outside == {1.0} and sum(inside) / len(inside) < budget


def floor_line(monkeypatch: pytest.MonkeyPatch, **settings: object) -> tuple[float, float]:
    """(expected, floor) as the node says them before the run."""
    said: list[str] = []
    with monkeypatch.context() as patch:
        patch.setattr(host, "send", lambda kind, payload: said.extend(payload["lines"] if payload.get("state") == "running" else ()))
        spent("euler 8 cfg 4", 0.2, **settings)
    expected, asked, floor = (float(part) / 100 for part in re.findall(r"([\d.]+) %", said[0]))
    assert asked == 0.2 and any("is below what this graph can reach; it runs at" in line for line in said)
    return expected, floor


@pytest.mark.parametrize("settings", [{}, {"adapter": adapter(), "substitute": "nothing"}], ids=["reuse", "router"])
def test_below_the_floor(settings: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs at the floor, has said so before, and says so after."""
    expected, floor = floor_line(monkeypatch, **settings)
    trace = last_trace()
    assert floor == pytest.approx(expected, abs=0.002)
    assert trace.facts["achieved"] == pytest.approx(floor, abs=0.02)
    assert all(evaluation.computed == pytest.approx(0.1, abs=0.02) for evaluation in trace.evaluations[1:])
    assert any("is the least this graph can spend here" in line for line in trace.facts["lines"])


def test_prompts_of_different_lengths() -> None:
    """Cond and uncond then run one after the other; the evaluation is booked once, with both."""
    run = {"steps": 6, "cfg": 3.0, "positive": prompt(1, 20), "negative": prompt(2, 7)}
    with block_flops(flux()) as dense:
        sample(flux(), **run)
    with block_flops(flux()) as count:
        sample(budgeted(flux(), 0.6), **run)
    trace = last_trace()
    assert dense.calls == count.calls == 2 * 6 * BLOCKS and len(trace.evaluations) == 6
    assert trace.evaluations[3].shape[1] == 2
    assert count.flops / dense.flops == pytest.approx(0.6, abs=0.02)
    assert trace.facts["achieved"] == pytest.approx(count.flops / dense.flops, abs=1e-3)


def test_an_extra_guidance_pass_is_dense_and_does_not_count() -> None:
    """As Skip Layer Guidance does: a post-CFG function that runs the model once more, in the same evaluation."""
    def again(args: dict) -> torch.Tensor:
        (extra,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], args["model_options"])
        return args["denoised"] + 0.5 * (args["cond_denoised"] - extra)

    guided = flux().clone()
    guided.set_model_sampler_post_cfg_function(again)
    with block_flops(flux()) as plain:
        sample(flux(), 6)
    with block_flops(flux()) as alone:
        sample(budgeted(flux(), 0.6), 6)
    with block_flops(flux()) as both:
        sample(budgeted(guided, 0.6), 6)
    trace = last_trace()
    assert trace.facts["achieved"] == pytest.approx(0.6, abs=0.02) and len(trace.evaluations) == 6
    assert both.flops == pytest.approx(alone.flops + plain.flops, rel=1e-3)
