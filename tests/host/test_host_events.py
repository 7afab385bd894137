"""What the widget hears while sampling and can ask for afterwards, through the host's own server object."""

from __future__ import annotations

import asyncio
import base64
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import BLOCKS, adapter, budgeted, flux, last_trace, prompt, sample  # first: starts the host

import comfy.sampler_helpers
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from comfy.model_management import InterruptProcessingException
from dydit_pack.dydit_core.trace import Evaluation, Trace, TraceStore
from dydit_pack.nodes import DyDiTExtension, events, host, report, routes
from server import PromptServer


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict, str]]:
    """(event, payload, client) as sent by a server whose prompt came from the client "tab"; every step is sent live."""
    sent: list[tuple[str, dict, str]] = []
    server = SimpleNamespace(client_id="tab", send_sync=lambda *message: sent.append(message), routes=web.RouteTableDef())
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    monkeypatch.setattr(events, "_LIVE_INTERVAL", -1.0)
    store = TraceStore()
    for module in (events, host, routes):
        monkeypatch.setattr(module, "STORE", store)
    return sent


def statuses(heard: list) -> list[dict]:
    return [payload for kind, payload, _ in heard if kind == "dydit.status"]


def steps(heard: list) -> list[dict]:
    return [payload for kind, payload, _ in heard if kind == "dydit.step"]


def get(*paths: str) -> list[tuple[int, dict]]:
    """Status and JSON of each path, over HTTP, from the routes that the pack registers."""
    async def ask() -> list[tuple[int, dict]]:
        await DyDiTExtension().on_load()
        app = web.Application()
        app.add_routes(PromptServer.instance.routes)
        async with TestClient(TestServer(app)) as client:
            answers = [await client.get(path) for path in paths]
            return [(answer.status, await answer.json()) for answer in answers]

    return asyncio.run(ask())


def test_a_run_is_told_from_start_to_end(heard: list) -> None:
    node = budgeted(flux(), 0.6, node="12:5")
    (ready,) = statuses(heard)
    assert ready["state"] == "ready" and ready["run"] == "" and ready["asked"] == 0.6
    assert re.fullmatch(r"At 256 × 256 a step costs at least [\d.]+ % of its block FLOPs, after a first step at 100 %; "
                        r"a run holds \d+ MB for each image and branch\.", ready["lines"][0])

    sample(node, 6, 2.0)
    _, running, done = statuses(heard)
    trace = last_trace()
    kinds = [(kind, payload.get("state")) for kind, payload, _ in heard[1:]]
    assert kinds == [("dydit.status", "running"), *[("dydit.step", None)] * 6, ("dydit.status", "done")]
    assert {payload["run"] for _, payload, _ in heard[1:]} == {trace.run}
    assert all((payload["node"], payload["workflow"], payload["v"], client) == ("12:5", "w", 2, "tab") for _, payload, client in heard)
    assert running["lines"][0].startswith("changed tokens × reuse: 60") and running["achieved"] is None
    assert done["achieved"] == pytest.approx(0.6, abs=0.02) and done["seconds_per_step"] > 0
    assert f"Asked 60 % → spent {100 * done['achieved']:.1f}".rstrip("0").rstrip(".") in done["lines"][0]
    assert "6 evaluations" in done["lines"][0]


@pytest.mark.parametrize("inputs", [{}, {"adapter": adapter(), "substitute": "nothing"}], ids=["reuse", "nothing"])
def test_memory_is_named_where_it_is_held(inputs: dict, heard: list) -> None:
    sample(budgeted(flux(), 0.6, **inputs), 2)
    ready, running, _ = (" ".join(status["lines"]) for status in statuses(heard))
    assert ("a run holds" in ready) == ("first step at 100 %" in ready) == (not inputs)
    assert f"The run holds {'' if inputs else '0 MB'}" in running


def test_before_a_run_the_node_says_what_few_steps_leave_and_what_the_last_run_took(heard: list) -> None:
    node = budgeted(flux(), 0.6, node="77")
    for steps, size in ((8, (16, 16)), (4, (16, 16)), (4, (16, 20))):
        sample(node, steps, size=size)
    first, second, other = (" ".join(status["lines"]) for status in statuses(heard) if status["state"] == "running")
    done = [status for status in statuses(heard) if status["state"] == "done"]
    assert "little to reuse" not in first and "4 steps: the first is computed in full, so there is little to reuse" in second
    assert "The last run here" not in first + other, "no run of this size was before them"
    assert f"The last run here took {done[0]['seconds_per_step']:.2f} s an evaluation, at {100 * done[0]['achieved']:.1f}" in second


@pytest.mark.parametrize("tokens, width, idles", [(272, 384, True), (4352, 3072, False), (1280, 3072, False), (256, 1152, True), (32 * 256, 1152, False)])
def test_a_gpu_is_filled_by_flux_and_not_by_the_demo(tokens: int, width: int, idles: bool) -> None:
    assert report.idles(tokens, width) is idles


def test_live_maps_are_the_trace(heard: list) -> None:
    sample(budgeted(flux(), 0.6), 6, 2.0, size=(12, 20))
    trace = last_trace()
    assert len(steps(heard)) == len(trace.evaluations) == 6
    for event, evaluation in zip(steps(heard), trace.evaluations):
        grid = np.frombuffer(base64.b64decode(event["grid"]), np.uint8).reshape(event["rows"], event["cols"])
        assert grid.shape == (6, 10) == (event["token_rows"], event["token_cols"])
        computed = evaluation.mask().mean((0, 1)).reshape(6, 10)
        assert np.abs(grid / 255 - computed).max() <= 0.5 / 255 + 1e-6
        assert (event["step"], event["total"], event["sigma"]) == (evaluation.index, 6, evaluation.sigma)
        assert event["computed"] == pytest.approx(computed.mean()) and event["flops"] == evaluation.flops
    assert [event["computed"] for event in steps(heard)][0] == 1.0
    assert len({event["grid"] for event in steps(heard)}) > 3  # the map moves


def test_a_large_maps_event_has_the_pictures_own_grid() -> None:
    mask = np.ones((2, 1, 256 * 90), dtype=bool)
    evaluation = Evaluation.of(0, 1.0, 1.0, mask, (True,), (256, 90))
    event = events.step_event(events.Address("5"), "r", 1, evaluation, ["double 0", "single 0"])
    assert (event["rows"], event["cols"], event["token_rows"], event["token_cols"]) == (64, 64, 256, 90)


def test_maps_are_throttled(heard: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """However fast the model is, the browser gets the first map and then at most ten a second; the trace has all."""
    monkeypatch.setattr(events, "_LIVE_INTERVAL", 3600.0)
    sample(budgeted(flux(), 0.6), 5)
    assert [event["step"] for event in steps(heard)] == [0] and len(last_trace().evaluations) == 5


def test_an_interrupted_run_says_so(heard: list) -> None:
    def stop(step: int, *_: object) -> None:
        if step == 1:
            raise InterruptProcessingException()

    with pytest.raises(InterruptProcessingException):
        sample(budgeted(flux(), 0.6), 5, callback=stop)
    assert [status["state"] for status in statuses(heard)] == ["ready", "running", "interrupted"]
    assert len(steps(heard)) == 2 and "2 evaluations" in statuses(heard)[-1]["lines"][0]


def test_loading_the_model_is_no_step(heard: list, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that moves only here: a hundred seconds to load the model, one for each evaluation."""
    clock, prepare = SimpleNamespace(now=0.0), comfy.sampler_helpers.prepare_sampling

    def slow(*args: object, **kwargs: object) -> object:
        clock.now += 100.0
        return prepare(*args, **kwargs)

    def tick(*_: object) -> None:
        clock.now += 1.0

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_sampling", slow)
    monkeypatch.setattr(host, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    hook = flux().model.diffusion_model.register_forward_pre_hook(tick)
    sample(budgeted(flux(), 0.6), 5)
    hook.remove()
    assert clock.now == 105.0 and statuses(heard)[-1]["seconds_per_step"] == 1.0
    assert "1.00 s each" in statuses(heard)[-1]["lines"][0]


@pytest.mark.parametrize("extra, found", [(None, ""), ({}, ""), ({"workflow": None}, ""), ({"workflow": {"id": "w"}}, "w")])
def test_the_workflow_of_a_prompt(extra: dict | None, found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    running = {0: (0, "prompt", {}, {"extra_pnginfo": extra}, [])}
    monkeypatch.setattr(PromptServer, "instance", SimpleNamespace(prompt_queue=SimpleNamespace(currently_running=running)), raising=False)
    assert events.workflow_id(extra) == found and events.current_prompt() == ("prompt", found)


def test_full_budget_says_that_nothing_is_recorded(heard: list) -> None:
    sample(budgeted(flux(), 1.0), 2)
    (status,) = statuses(heard)
    assert status["lines"] == ["Budget 100 %: the model is untouched and nothing is recorded."]
    (kept,) = events.STORE.newest_first()
    assert not steps(heard) and kept.facts == status and not kept.evaluations, "a page that is loaded later reads it too"


def test_what_is_worth_knowing_stays_on_the_node(heard: list) -> None:
    """A warning, and that auto passes the adapter by: before the run, while it runs, and in what is kept of it."""
    other = adapter()
    other = replace(other, facts=replace(other.facts, base={"img_in.bias": (100.0, 100.0)}))
    sample(budgeted(flux(), 0.6, adapter=other), 4)
    for status in statuses(heard):
        assert any("was trained on other weights" in line for line in status["lines"])
        assert any(line.startswith("The adapter is not used: auto takes changed tokens") for line in status["lines"])
    lines = last_trace().facts["lines"]
    assert any(line.startswith("The floor here is ") for line in lines) and any(line.startswith("The run held ") for line in lines)


def test_full_budget_after_another_node_says_what_stays(heard: list) -> None:
    first = budgeted(flux(), 0.6, node="1")
    assert budgeted(first, 1.0, node="2") is first
    assert statuses(heard)[-1]["lines"] == ["Budget 100 % here, but an earlier DyDiT Budget on this model stays at 60 %."]
    sample(first, 2)
    assert statuses(heard)[-1]["node"] == "1" and statuses(heard)[-1]["asked"] == 0.6


def test_without_a_server_nothing_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(PromptServer, "instance", raising=False)
    sample(budgeted(flux(), 0.6), 2)
    assert last_trace().facts["state"] == "done"


def test_runs_and_traces_over_http(heard: list) -> None:
    for node, budget in (("5", 0.6), ("7", 0.7), ("5", 0.8)):
        sample(budgeted(flux(), budget, node=node), 3)
    done = [status for status in statuses(heard) if status["state"] == "done"]
    (_, of_five), (_, of_any), (_, elsewhere), (code, trace) = get(
        "/dydit/runs?node=5&workflow=w", "/dydit/runs?node=7", "/dydit/runs?node=5&workflow=other", f"/dydit/trace/{done[0]['run']}")
    assert [run["run"] for run in of_five["runs"]] == [done[2]["run"], done[0]["run"]]  # newest first
    assert [run["asked"] for run in of_any["runs"]] == [0.7] and elsewhere["runs"] == []
    assert of_five["runs"][1] == {**done[0], "evaluations": 3}
    assert code == 200 and {key: trace[key] for key in done[0]} == done[0] and len(trace["steps"]) == 3


def test_a_run_that_is_no_longer_kept(heard: list) -> None:
    sample(budgeted(flux(), 0.6), 2)
    first = last_trace()
    for number in range(events.STORE.runs):
        events.STORE.put(Trace(f"later {number}", {"node": "5", "workflow": "w"}, (), config="c"))
    ((code, answer),) = get(f"/dydit/trace/{first.run}")
    assert code == 404
    assert answer == {"error": "This run is no longer kept: only the last 8 runs are. Run the graph again."}


def test_a_trace_is_small(heard: list) -> None:
    """Bits, and two means: a run of a hundred steps on a 1024² picture must fit in the store many times."""
    sample(budgeted(flux(), 0.6), 4, 2.0, positive=prompt(1))
    bits, maps, kept = BLOCKS * 2 * 64 // 8, 2 * 64 * 2, 2 * BLOCKS * 4
    assert last_trace().nbytes == 4 * (bits + maps + kept)
