"""What else artists put in a graph: each works together with the node, and the Trace stays true to what was computed."""

from __future__ import annotations

import pytest
import torch
from masking import check_against_masked, masked  # first: starts the host
from tiny import BLOCKS, DOUBLE, IMAGE, TEXT, WIDTH, adapter, budgeted, flux, last_trace, prompt, sample

import comfy.sample
import comfy.samplers
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from comfy_extras.nodes_slg import SkipLayerGuidanceDiT
from dydit_pack.nodes import events
from dydit_pack.nodes.model import branches_of
from torch import Tensor


def reference(height: int, width: int) -> Tensor:
    return torch.randn(1, 16, height, width, generator=torch.Generator().manual_seed(2))


def test_two_samplers_on_one_model() -> None:
    """The second run starts without the first one's history, at its own size."""
    node = budgeted(flux(), 0.6)
    runs = [{"steps": 5, "seed": 5}, {"steps": 5, "seed": 6, "size": (12, 20)}, {"steps": 5, "seed": 6}]
    found = [sample(node, **run) for run in runs]
    traces = events.STORE.newest_first()[: len(runs)]
    assert len({trace.run for trace in traces}) == len(runs)
    assert all(trace.evaluations[0].computed == 1.0 for trace in traces)
    for run, picture in zip(runs, found):
        assert torch.equal(picture, sample(budgeted(flux(), 0.6), **run))


def test_the_last_of_two_nodes_wins() -> None:
    sample(budgeted(flux(), 0.8), 3)
    both = budgeted(budgeted(flux(), 0.5, node="1"), 0.8, node="2")
    earlier = last_trace().run
    found = sample(both, 5)
    assert last_trace().facts["node"] == "2" and events.STORE.newest_first()[1].run == earlier  # one run, not two
    assert last_trace().facts["achieved"] == pytest.approx(0.8, abs=0.02)
    assert torch.equal(found, sample(budgeted(flux(), 0.8), 5))


@pytest.mark.parametrize("count", [2, 3])
def test_images_of_a_batch_choose_their_own_tokens(count: int) -> None:
    found = check_against_masked(flux(), {"steps": 4, "batch": count}, True)
    mask = last_trace().evaluations[-1].mask()
    assert mask.shape == (BLOCKS, count, IMAGE) and not (mask[:, :1] == mask).all()
    assert len(set(mask.sum(2).flatten())) == 1  # the same number everywhere: a fixed capacity
    assert found.shape[0] == count


def test_prompts_of_different_lengths() -> None:
    """They run one after the other, each with its own history."""
    check_against_masked(flux(), {"steps": 5, "cfg": 3.0, "positive": prompt(1, 20), "negative": prompt(2, 7)}, True)
    assert [evaluation.shape for evaluation in last_trace().evaluations] == [(BLOCKS, 2, IMAGE)] * 5


def test_a_model_of_double_blocks_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(flux().model.diffusion_model._modules, "single_blocks", torch.nn.ModuleList())
    sample(budgeted(flux(), 0.9, min_keep=0.0), 6)
    assert last_trace().evaluations[0].shape == (DOUBLE, 1, IMAGE)
    assert last_trace().facts["achieved"] == pytest.approx(0.9, abs=0.02)
    with pytest.raises(ValueError, match=f"this model is a FLUX of width {WIDTH} with {DOUBLE} double and 0 single blocks"):
        budgeted(flux(), 0.9, adapter=adapter())


def test_a_batch_that_is_split_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host joins and splits cond and uncond by what memory is free: each keeps its history, and none is computed anew."""
    run = {"steps": 6, "cfg": 3.0}
    with monkeypatch.context() as patch:
        free = iter([1e18, 0, 0, 1e18, 1e18, 0, 0, 1e18])  # asked for once a pass
        patch.setattr(ModelPatcher, "get_free_memory", lambda *_: next(free))
        found = sample(budgeted(flux(), 0.55), **run)
    assert next(free, None) is None
    trace = last_trace()
    assert [evaluation.computed == 1.0 for evaluation in trace.evaluations] == [True] + [False] * 5
    assert trace.facts["achieved"] == pytest.approx(0.55, abs=0.02)
    with masked(flux(), trace, reuse=True):
        expected = sample(flux(), **run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4 * float(expected.abs().max()))


def test_unequal_branches_of_different_lengths() -> None:
    """A share for each branch, also where each has a pass of its own."""
    run = {"steps": 5, "cfg": 3.0, "positive": prompt(1, 20), "negative": prompt(2, 7)}
    check_against_masked(flux(), run, True, branch_share=2.0)
    trace = last_trace()
    mask = trace.evaluations[-1].mask().mean((0, 2))
    assert sorted(mask)[1] == pytest.approx(2 * sorted(mask)[0], rel=0.1)
    assert trace.facts["achieved"] == pytest.approx(0.55, abs=0.02)


def test_a_reference_on_the_positive_prompt_alone() -> None:
    """Usual with Kontext: cond has more tokens than uncond. The map shows what both have, the picture."""
    run = {"steps": 5, "cfg": 3.0, "positive": prompt(1, reference_latents=[reference(12, 8)])}
    found = sample(budgeted(flux(), 0.6), **run)
    trace = last_trace()
    assert trace.facts["state"] == "done" and trace.facts["achieved"] == pytest.approx(0.6, abs=0.02)
    assert [evaluation.shape for evaluation in trace.evaluations] == [(BLOCKS, 2, IMAGE)] * 5
    assert trace.evaluations[-1].mean_map().shape == (8, 8)
    assert 0.01 < (found - sample(flux(), **run)).abs().max() < 3


def test_two_prompts_on_one_picture() -> None:
    """Conditioning (Combine): three rows for one image, of which two are cond."""
    run = {"steps": 4, "cfg": 2.0, "positive": [*prompt(1), *prompt(3)]}
    check_against_masked(flux(), run, True)
    assert last_trace().evaluations[0].shape == (BLOCKS, 3, IMAGE)


def test_a_prompt_for_an_area() -> None:
    """Conditioning (Set Area): a pass over a part of the picture; the map shows the passes over all of it."""
    run = {"steps": 5, "positive": [*prompt(1), *prompt(3, area=(8, 16, 8, 0))]}
    found = sample(budgeted(flux(), 0.6), **run)
    trace = last_trace()
    assert trace.facts["state"] == "done" and trace.facts["achieved"] == pytest.approx(0.6, abs=0.025)
    assert [(evaluation.shape, evaluation.grid) for evaluation in trace.evaluations] == [((BLOCKS, 1, IMAGE), (8, 8))] * 5
    assert 0.01 < (found - sample(flux(), **run)).abs().max() < 3


@pytest.mark.parametrize("order", ["shift, budget", "budget, shift"])
def test_windows_follow_a_shift_node(order: str) -> None:
    """ModelSamplingFlux replaces the schedule as an object patch, which is in place only once the model is loaded."""
    def shift(model: ModelPatcher) -> ModelPatcher:
        return ModelSamplingFlux().patch(model, 3.0, 3.0, 1024, 1024)[0]

    def budget(model: ModelPatcher) -> ModelPatcher:
        return budgeted(model, 0.6, start_percent=0.25, end_percent=0.75, min_keep=0.0)

    sample(flux(), 1)  # another clone was loaded before
    model = budget(shift(flux())) if order == "shift, budget" else shift(budget(flux()))
    sample(model, 8)
    sampling = model.get_model_object("model_sampling")
    start, end = sampling.percent_to_sigma(0.25), sampling.percent_to_sigma(0.75)
    assert end > flux().get_model_object("model_sampling").percent_to_sigma(0.3)  # a strong shift: the windows hardly overlap
    inside = [end <= evaluation.sigma <= start for evaluation in last_trace().evaluations]
    computed = [evaluation.computed for evaluation in last_trace().evaluations]
    assert 2 <= sum(inside) < 8
    assert all(part == 1.0 for part, within in zip(computed, inside) if not within)
    assert all(part < 1.0 for part, within in zip(computed, inside) if within)


def overridden(model: ModelPatcher, seen: list[tuple[int, int]]) -> ModelPatcher:
    """`model` after another pack's attention node (sage, flash …): it gets every call, and here passes it on sharper."""
    model = model.clone()

    def override(function: object, q: Tensor, k: Tensor, v: Tensor, *args: object, **kwargs: object) -> Tensor:
        seen.append((q.shape[2], k.shape[2]))
        return function(2 * q, k, v, *args, **kwargs)

    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def test_an_attention_override_gets_the_kept_queries() -> None:
    seen: list[tuple[int, int]] = []
    found = check_against_masked(overridden(flux(), seen), {"steps": 3}, True)
    assert (found - sample(budgeted(flux(), 0.55), 3)).abs().max() > 0.01
    tokens = IMAGE + TEXT
    assert set(seen[: 3 * BLOCKS]) > {(tokens, tokens)} and all(keys == tokens for _, keys in seen)
    assert min(queries for queries, _ in seen) < 0.8 * tokens


def test_skip_layer_guidance() -> None:
    """The stock node runs the model once more without some layers: that pass is dense, and not ours to count."""
    guided = SkipLayerGuidanceDiT.execute(flux(), 2.0, 0.0, 1.0, "", "1").result[0]
    calls: list[int] = []
    hook = flux().model.diffusion_model.register_forward_pre_hook(lambda *_: calls.append(1))
    found = sample(budgeted(guided, 0.6), 5)
    hook.remove()
    assert len(calls) == 10 and len(last_trace().evaluations) == 5
    assert last_trace().facts["achieved"] == pytest.approx(0.6, abs=0.02)
    assert (found - sample(guided, 5)).abs().max() < (found - sample(flux(), 5)).abs().max()


@pytest.mark.parametrize("kind, index", [("double_block", 0), ("single_block", 1)])
def test_a_block_that_another_node_skips_at_first(kind: str, index: int) -> None:
    """Its history begins when it first runs; until then there is nothing to reuse."""
    model, left = flux().clone(), [2]

    def skip_twice(args: dict, extra: dict) -> dict:
        left[0] -= 1
        return args if left[0] >= 0 else extra["original_block"](args)

    model.set_model_patch_replace(skip_twice, "dit", kind, index)
    sample(budgeted(model, 0.6, min_keep=0.0), 5)
    assert last_trace().facts["state"] == "done"
    block = last_trace().evaluations[2].mask()[index if kind == "double_block" else DOUBLE + index]
    assert block.all() and not last_trace().evaluations[2].mask().all()


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "uni_pc", "euler_ancestral", "lcm", "heunpp2", "seeds_3", "dpm_adaptive"])
def test_samplers_of_every_kind(sampler: str) -> None:
    sample(budgeted(flux(), 0.6), 8, sampler=sampler)
    assert last_trace().facts["achieved"] == pytest.approx(0.6, abs=0.02)
    assert [evaluation.index for evaluation in last_trace().evaluations if evaluation.computed == 1.0] == [0]


def test_a_restart_forgets_history() -> None:
    """Sigma that rises again (restart samplers, several passes): what was computed at lower noise is worth nothing."""
    sigmas = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.8, 0.6, 0.3, 0.0])
    sampler = comfy.samplers.sampler_object("euler")
    latent = torch.zeros(1, 16, 16, 16)
    comfy.sample.sample_custom(budgeted(flux(), 0.6), torch.randn_like(latent), 1.0, sampler, sigmas, prompt(1), prompt(2), latent,
                               disable_pbar=True, seed=1)
    computed = [evaluation.computed for evaluation in last_trace().evaluations]
    assert [index for index, part in enumerate(computed) if part == 1.0] == [0, 4]


@pytest.mark.parametrize("kinds, cond, uncond", [
    ([0], (0, 6), (6, 6)), ([1], (0, 0), (0, 6)), ([1, 0], (3, 6), (0, 3)), ([0, 1], (0, 3), (3, 6)), ([1, 0, 0], (2, 6), (0, 2)),
    ([1, 0, 1], (0, 6), (6, 6)), ([0, 1, 0], (0, 6), (6, 6)), ([], (0, 6), (6, 6)),
])
def test_branches_are_read_off_the_hosts_batch(kinds: list[int], cond: tuple[int, int], uncond: tuple[int, int]) -> None:
    found = branches_of({"cond_or_uncond": kinds, "uuids": ["a"]}, 6)
    assert (found.cond, found.uncond) == (slice(*cond), slice(*uncond))
