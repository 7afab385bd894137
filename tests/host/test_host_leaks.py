"""Nothing of a run stays behind: not after success, not after an error, not after the artist's interrupt."""

from __future__ import annotations

import gc
import threading
import weakref
from functools import partial
from operator import attrgetter

import pytest
import torch
from tiny import BLOCKS, IMAGE, WIDTH, adapter, blocks, budgeted, flux, last_trace, prompt, sample, transformer, wide_adapter  # first: starts the host

from comfy import model_management
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from dydit_pack.dydit_core import runtime
from dydit_pack.dydit_core.families.flux import FluxFamily
from dydit_pack.dydit_core.routers.change import ChangeRouter, ChangeState
from dydit_pack.dydit_core.runtime import Method
from dydit_pack.dydit_core.substitutes.history import Reuse, ReuseState
from dydit_pack.nodes import report
from dydit_pack.nodes.host import KEY, installed

# Bytes that reuse and the router of changed tokens hold for an image token: outputs, and every fourth channel with an age.
A_ROW = BLOCKS * (WIDTH * 4 + WIDTH // 4 * 4 + 2)


def structure(value: object) -> object:
    """Nested options down to the identity of what is in them."""
    if isinstance(value, dict):
        return {key: structure(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [structure(entry) for entry in value]
    return id(value)


@pytest.fixture
def untouched():
    """Whatever a test does, the shared module and both MODELs are afterwards as they were."""
    model = flux().clone()
    node = budgeted(model, 0.5, min_keep=0.0)
    before = [structure(patcher.model_options) for patcher in (model, node)]
    wrappers = [structure(patcher.wrappers) for patcher in (model, node)]
    yield node
    assert [structure(patcher.model_options) for patcher in (model, node)] == before
    assert [structure(patcher.wrappers) for patcher in (model, node)] == wrappers
    assert not [name for name, module in model.model.named_modules() if "forward" in module.__dict__]
    assert runtime._current.get(None) is None
    assert not model.wrappers.get(WrappersMP.OUTER_SAMPLE)


def fresh_picture() -> torch.Tensor:
    """The same graph, queued anew."""
    return sample(budgeted(flux().clone(), 0.5, min_keep=0.0), 5, 3.0)


@pytest.mark.parametrize("inputs", [{}, {"adapter": adapter()}, {"method": "alternate steps", "start_percent": 0.9, "end_percent": 0.8}])
def test_full_budget_hands_back_the_same_object(inputs: dict) -> None:
    model = flux()
    before = structure(model.model_options), structure(model.wrappers)
    assert budgeted(model, 1.0, **inputs) is model
    assert (structure(model.model_options), structure(model.wrappers)) == before


def test_the_node_stores_one_wrapper_and_nothing_in_the_options() -> None:
    model = flux().clone()
    node = budgeted(model, 0.5)
    assert node is not model and node.model is model.model
    assert structure(node.model_options) == structure(model.model_options)
    assert node.model_options["transformer_options"] == {}
    assert {kind: list(keys) for kind, keys in node.wrappers.items() if keys} == {WrappersMP.OUTER_SAMPLE: [KEY]}
    assert not node.object_patches and not node.attachments and not node.patches and not node.injections


def test_settings_are_resolved_when_the_node_runs() -> None:
    settings = installed(budgeted(flux(), 0.5))
    assert (settings.router, settings.substitute) == ("changed tokens", "reuse")
    assert settings.method == Method(ChangeRouter(), Reuse())


def test_after_a_run(untouched: ModelPatcher) -> None:
    first = sample(untouched, 5, 3.0)
    assert last_trace().facts["state"] == "done"
    assert torch.equal(sample(untouched, 5, 3.0), first)  # the cached MODEL, queued again


def test_history_is_what_was_announced_and_is_freed(untouched: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gigabytes on a real model: the node says how many, and they go when sampling ends, not when the next run begins."""
    held: list[weakref.ref] = []
    sizes: dict[str, int] = {}
    announced: list[int] = []
    before = report.before

    def watch(state: type, method: str, *memories: str) -> None:
        original = getattr(state, method)

        def watched(self: object, *args: object) -> object:
            held.append(weakref.ref(self))
            out = original(self, *args)
            sizes[method] = sum(last.untyped_storage().nbytes() for memory in memories for last in attrgetter(memory)(self).values())
            return out

        monkeypatch.setattr(state, method, watched)

    watch(ReuseState, "update", "last")
    watch(ChangeState, "computed", "sketches.held", "ages")
    monkeypatch.setattr(report, "before", lambda asked, outlook: announced.append(outlook.held_bytes) or before(asked, outlook))
    sample(untouched, 3, 2.0, batch=2)
    gc.collect()
    assert held and not [state for state in held if state() is not None]
    assert announced == [sum(sizes.values())] == [4 * A_ROW * IMAGE]


@pytest.mark.parametrize("cfg, rows", [(1.0, 2), (3.0, 4)])
def test_the_host_keeps_room_for_the_history(cfg: float, rows: int, untouched: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it fills the card with weights up to what the untouched model needs. Reference images have a history too."""
    asked: list[tuple[float, float]] = []
    load = model_management.load_models_gpu

    def watched(models: list, *args: object, **kwargs: object) -> None:
        asked.append((kwargs["memory_required"], kwargs["minimum_memory_required"]))
        return load(models, *args, **kwargs)

    monkeypatch.setattr(model_management, "load_models_gpu", watched)
    positive = prompt(1, reference_latents=[torch.zeros(1, 16, 8, 8)])
    wide = wide_adapter()
    for node in (flux(), untouched, budgeted(flux(), 0.5, adapter=wide, method="learned tokens", substitute="nothing")):
        sample(node, 2, cfg, batch=2, positive=positive)
    dense, reuse, nothing = asked
    held = A_ROW * (rows * IMAGE + 2 * 16)
    assert [most - least for most, least in zip(reuse, dense)] == pytest.approx([held, held])
    cut = sum(layer.weight.nbytes for block in blocks(flux()) for name, layer in FluxFamily().layers(block).items() if "txt_mlp" not in name)
    copied = sum(param.nbytes for part in (wide.scores, wide.low_rank) for param in part.parameters())
    assert [most - least for most, least in zip(nothing, dense)] == pytest.approx([cut + copied] * 2)
    assert "memory_required" not in vars(flux().model)


def test_after_an_interrupt(untouched: ModelPatcher) -> None:
    def stop(step: int, *_: object) -> None:
        if step == 2:
            raise InterruptProcessingException()

    expected = fresh_picture()
    with pytest.raises(InterruptProcessingException):
        sample(untouched, 5, 3.0, callback=stop)
    trace = last_trace()
    assert trace.facts["state"] == "interrupted" and trace.facts["lines"][0].startswith("Asked 50 % → spent") and " so far" in trace.facts["lines"][0]
    assert len(trace.evaluations) == 3
    assert trace.facts["achieved"] == pytest.approx(sum(evaluation.flops for evaluation in trace.evaluations) / 3)
    assert torch.equal(sample(untouched, 5, 3.0), expected)


@pytest.mark.parametrize("error, state, said", [
    (RuntimeError("out of memory"), "failed", "Stopped by an error. Asked 50 %"),
    (InterruptProcessingException(), "interrupted", "Asked 50 %"),
], ids=["error", "interrupt"])
def test_after_an_exception_in_the_model(untouched: ModelPatcher, error: BaseException, state: str, said: str) -> None:
    """The host checks for interrupts in every layer: here in the middle of a block, while ours are in its place."""
    expected, seen = fresh_picture(), []

    def fail(*_: object) -> None:
        seen.append("forward" in blocks(flux())[-1].__dict__)
        if len(seen) == 8:
            raise error

    hook = transformer(flux()).single_blocks[-1].linear2.register_forward_pre_hook(fail)
    try:
        with pytest.raises(type(error)):
            sample(untouched, 8)
    finally:
        hook.remove()
    assert all(seen)
    assert last_trace().facts["state"] == state and len(last_trace().evaluations) == 7
    assert last_trace().facts["lines"][0].startswith(said)
    assert torch.equal(sample(untouched, 5, 3.0), expected)


def test_an_error_before_the_first_step(untouched: ModelPatcher) -> None:
    hook = transformer(flux()).img_in.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    try:
        with pytest.raises(RuntimeError, match="no"):
            sample(untouched, 3)
    finally:
        hook.remove()
    trace = last_trace()
    assert trace.facts["state"] == "failed" and trace.evaluations == ()
    assert trace.facts["achieved"] is None and trace.facts["lines"] == ["Stopped by an error before the first step.", "no"]


def test_a_run_that_cannot_start_leaves_no_thread(untouched: ModelPatcher, monkeypatch: pytest.MonkeyPatch) -> None:
    def no(*_: object) -> float:
        raise RuntimeError("no sigma")

    monkeypatch.setattr(flux().get_model_object("model_sampling"), "percent_to_sigma", no)
    with pytest.raises(RuntimeError, match="no sigma"):
        sample(untouched, 3)
    assert not [thread for thread in threading.enumerate() if thread.name == "dydit-trace"]


def test_what_another_pack_put_in_place_of_a_forward_stays(untouched: ModelPatcher) -> None:
    """It is refused, not put aside; and it is there again after."""
    block = blocks(flux())[0]
    theirs = block.forward = partial(block.forward)
    try:
        with pytest.raises(ValueError, match=r"another node replaced the forward of double_blocks\.0"):
            sample(untouched, 3)
        assert block.forward is theirs
    finally:
        del block.__dict__["forward"]
