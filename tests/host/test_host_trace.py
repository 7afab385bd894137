"""A run's trace in the host: what its routes answer, and that a LATENT leads back to the run that gave it."""

from __future__ import annotations

import asyncio
import base64
import threading
from itertools import islice

import numpy as np
import pytest
import torch
from tiny import BLOCKS, GROUPS, SIDE, budgeted, flux, last_trace, prompt, sample, wide_adapter  # first: starts the host
from test_host_events import get, heard, statuses, steps  # noqa: F401 - `heard` is a fixture

import comfy.samplers
import comfy_extras.nodes_custom_sampler as custom
import nodes as host_nodes
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from comfy.cli_args import LatentPreviewMethod, args
from dydit_pack.dydit_core import wire
from dydit_pack.dydit_core import recorder as recording
from dydit_pack.dydit_core.trace import Trace, fingerprint
from dydit_pack.nodes import DyDiTExtension, events, host, routes
from dydit_pack.nodes.host import installed
from server import PromptServer

pytestmark = pytest.mark.usefixtures("heard")
NAMES = ["double 0", "single 0", "single 1"]


def fractions(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape) / 255


def near(one: np.ndarray, other: np.ndarray) -> bool:
    """But for the rounding to a byte."""
    return bool(np.abs(one - other).max() <= 0.5 / 255 + 1e-3)


@pytest.mark.parametrize("words, cond", [(12, (False, True)), (20, (True, False))], ids=["in one batch", "one after the other"])
def test_maps_and_numbers_of_both_branches(words: int, cond: tuple[bool, bool]) -> None:
    """The host puts uncond first where it puts both in one batch. With a share of 2 their masks cannot be mistaken."""
    sample(budgeted(flux(), 0.7, branch_share=2.0), 4, 2.0, positive=prompt(1, words), negative=prompt(2, 12))
    trace = last_trace()
    assert all(evaluation.cond == cond for evaluation in trace.evaluations)
    (_, summary), *maps = get(f"/dydit/trace/{trace.run}", *(
        f"/dydit/trace/{trace.run}/{step}/{block}?branch={branch}" for step in range(4) for block in range(3) for branch in ("cond", "uncond")))
    assert summary["blocks"] == NAMES and summary["branches"] == ["cond", "uncond"] and summary["frames"] == 1
    assert [step["step"] for step in summary["steps"]] == [0, 1, 2, 3] and all(step["seconds"] > 0 for step in summary["steps"])
    kept = []
    for status, answer in maps:
        mask = trace.at(answer["step"]).mask()[answer["block"], cond.index(answer["branch"] == "cond")]
        assert status == 200 and near(fractions(answer["grid"], 8, 8), mask.reshape(8, 8))
        assert answer["computed"] == pytest.approx(mask.mean()) and answer["heads"] is answer["groups"] is None
        kept.append(mask.mean())
    kept = np.array(kept).reshape(4, 3, 2)
    assert near(fractions(summary["kept"]["cond"], 4, 3), kept[..., 0]) and near(fractions(summary["kept"]["uncond"], 4, 3), kept[..., 1])
    assert kept[1, :, 0].sum() > kept[1, :, 1].sum() > 0


def test_live_steps_say_what_the_trace_says(heard: list) -> None:  # noqa: F811
    sample(budgeted(flux(), 0.7, adapter=wide_adapter(), substitute="nothing"), 3, 2.0)
    trace, ((_, summary),) = last_trace(), get(f"/dydit/trace/{last_trace().run}")
    for index, (event, evaluation) in enumerate(zip(steps(heard), trace.evaluations)):
        assert (event["v"], event["blocks"], event["branches"], event["frames"]) == (2, NAMES, ["cond", "uncond"], 1)
        for name in ("heads", "groups"):
            assert near(fractions(event[name], 3), fractions(summary[name], 3, 3)[index])
        for branch, kept in event["kept"].items():
            assert near(fractions(kept, 3), fractions(summary["kept"][branch], 3, 3)[index])
        assert event == {**event, **wire.live(evaluation, NAMES)}


def test_widths_are_those_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against what the router gives out while it samples."""
    chosen, open_ = [], host.Run.open

    def watched(self: host.Run, *inputs: object) -> object:
        chosen.append(open_(self, *inputs))
        return chosen[-1]

    monkeypatch.setattr(host.Run, "open", watched)
    sample(budgeted(flux(), 0.6, adapter=wide_adapter(), substitute="nothing"), 3)
    paths = [f"/dydit/trace/{last_trace().run}/{step}/{block}" for step in range(3) for block in range(BLOCKS)]
    for place, (_, answer) in enumerate(get(*paths)):
        width = chosen[place // BLOCKS].width(place % BLOCKS)
        for digits, kept, count in ((answer["heads"], width.heads, 2), (answer["groups"], width.groups, GROUPS)):
            on = range(count) if kept is None else kept.tolist()
            assert digits == "".join("1" if unit in on else "0" for unit in range(count))
    assert any("0" in answer["groups"] for _, answer in get(*paths))


def test_what_is_not_there_is_answered_in_a_sentence() -> None:
    sample(budgeted(flux(), 0.6), 2)
    run = last_trace().run
    said = {
        f"{run}/2/0": "There is no map of step 2: this run has the steps 0 to 1.",
        f"{run}/0/3": "There is no block 3: this model has the blocks 0 to 2.",
        f"{run}/0/-1": "There is no block -1: this model has the blocks 0 to 2.",
        f"{run}/last/0": 'A step is a number or "mean".',
        f"{run}/0/{'9' * 5000}": 'A block is a number or "mean".',
        f"{run}/0/0?branch=uncond": "There is no such branch here: there is cond.",
        f"{run}/mean/mean?branch=": "There is no such branch here: there is cond.",
        f"{run}/0/mean?frame=1": "There is no frame 1: there are 1, counted from 0.",
        f"{run}/0/mean?frame=mean": "A frame is a number.",
        "none/0/0": "This run is no longer kept: only the last 8 runs are. Run the graph again.",
    }
    for (status, answer), sentence in zip(get(*(f"/dydit/trace/{path}" for path in said)), said.values()):
        assert (status, answer) == (404, {"error": sentence})


def test_means_over_steps_and_blocks() -> None:
    sample(budgeted(flux(), 0.6), 3)
    trace = last_trace()
    masks = np.stack([evaluation.mask()[:, 0] for evaluation in trace.evaluations]).reshape(3, BLOCKS, 8, 8)
    paths = {"mean/mean": masks.mean((0, 1)), "1/mean": masks[1].mean(0), "mean/2": masks[:, 2].mean(0), "2/0": masks[2, 0]}
    for (status, answer), (path, expected) in zip(get(*(f"/dydit/trace/{trace.run}/{path}" for path in paths)), paths.items()):
        assert status == 200 and "/".join(str(answer[name]) for name in ("step", "block")) == path
        assert near(fractions(answer["grid"], 8, 8), expected) and answer["computed"] == pytest.approx(expected.mean(), abs=1e-3)


def test_a_client_that_floods_the_route_is_told_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Unpacking here takes until the others were answered: eight work, the rest are sent away, and then all is as before."""
    sample(budgeted(flux(), 0.6), 2)
    path, unpack, go_on = f"/dydit/trace/{last_trace().run}/0/0", wire.one_map, threading.Event()
    monkeypatch.setattr(wire, "one_map", lambda *inputs: (go_on.wait(), unpack(*inputs))[1])

    async def flood() -> tuple[list, list]:
        await DyDiTExtension().on_load()
        app = web.Application()
        app.add_routes(PromptServer.instance.routes)
        async with TestClient(TestServer(app)) as client:
            asked = [asyncio.ensure_future(client.get(path)) for _ in range(20)]
            try:
                refused = [await one for one in islice(asyncio.as_completed(asked, timeout=60), 20 - routes.AT_ONCE)]
                runs = await client.get("/dydit/runs?node=5")
            finally:
                go_on.set()
            answers, again = await asyncio.gather(*asked), await client.get(path)
            told = [(one.status, one.headers.get("Retry-After"), await one.json()) for one in refused]
            return told, [sorted(one.status for one in answers), runs.status, again.status]

    refused, rest = asyncio.run(flood())
    assert refused == [(429, "1", {"error": "8 maps are being unpacked: ask again in a second."})] * 12
    assert rest == [[200] * 8 + [429] * 12, 200, 200]


def test_lost_evaluations_are_said(heard: list, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """The recorder is kept from its work until all steps were taken."""
    monkeypatch.setattr(recording, "PENDING_BYTES", 2 * BLOCKS * 64)
    started, finish, go_on = threading.Event(), host.Recorder.finish, threading.Event()
    call = events.LiveMap.__call__
    monkeypatch.setattr(events.LiveMap, "__call__", lambda self, part: (started.set(), go_on.wait(), call(self, part)))
    monkeypatch.setattr(host.Recorder, "finish", lambda self: (go_on.set(), finish(self))[1])
    sample(budgeted(flux(), 0.6), 6, callback=lambda step, *_: step == 1 and started.wait())
    trace = last_trace()
    assert [evaluation.index for evaluation in trace.evaluations] == [0, 1] and trace.facts["dropped"] == 4
    assert statuses(heard)[-1]["lines"][-1] == "4 of 6 evaluations are not in the map: recording them would have held up sampling."
    ((_, summary),) = get(f"/dydit/trace/{trace.run}")
    assert [step["step"] for step in summary["steps"]] == [0, 1] and trace.facts["achieved"] == pytest.approx(0.6, abs=0.02)


@pytest.fixture(params=[LatentPreviewMethod.NoPreviews, LatentPreviewMethod.Latent2RGB], ids=["no preview", "preview"])
def previews(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "preview_method", request.param)


def empty(batch: int = 1) -> dict:
    return {"samples": torch.zeros(batch, 16, SIDE, SIDE)}


def ksampler(model: object, seed: int = 5, cfg: float = 1.0, sampler: str = "euler", **more: object) -> dict:
    inputs = {"denoise": 1.0, "latent_image": empty(), **more}
    return host_nodes.KSampler().sample(model, seed, 3, cfg, sampler, "simple", prompt(1), prompt(2), **inputs)[0]


def custom_sampler(model: object, sampler: str = "euler", sigmas: slice = slice(None)) -> tuple[dict, dict]:
    steps_ = custom.BasicScheduler.execute(model, "simple", 3, 1.0).result[0][sigmas]
    guider = custom.BasicGuider.execute(model, prompt(1)).result[0]
    return custom.SamplerCustomAdvanced.execute(
        custom.Noise_RandomNoise(5), guider, comfy.samplers.sampler_object(sampler), steps_, empty()).result


def found(model: object, latent: dict) -> Trace | None:
    return events.STORE.find(installed(model).id, fingerprint(latent["samples"]))


@pytest.mark.usefixtures("previews")
@pytest.mark.parametrize("more", [{}, {"cfg": 2.0}, {"sampler": "heun"}, {"sampler": "uni_pc"}, {"sampler": "dpmpp_2m_sde"},
                                  {"latent_image": empty(2)}, {"latent_image": {"samples": torch.ones(1, 16, SIDE, SIDE)}, "denoise": 0.5}],
                         ids=["plain", "cfg", "heun", "uni_pc", "sde", "batch", "from a picture"])
def test_the_latent_of_a_ksampler_leads_to_its_run(more: dict) -> None:
    model = budgeted(flux(), 0.6)
    latent = ksampler(model, **more)
    assert found(model, latent) is last_trace() and last_trace().facts["state"] == "done"


@pytest.mark.usefixtures("previews")
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m"])
@pytest.mark.parametrize("sigmas", [slice(None), slice(0, 3)], ids=["to the end", "noise left"])
def test_both_latents_of_a_custom_sampler_lead_to_its_run(sampler: str, sigmas: slice) -> None:
    """`denoised_output` is what the model last thought the picture is: all noise is left in `output` where sampling stops early."""
    model = budgeted(flux(), 0.6)
    output, denoised = custom_sampler(model, sampler, sigmas)
    assert found(model, output) is found(model, denoised) is last_trace()
    assert (fingerprint(output["samples"]) == fingerprint(denoised["samples"])) <= (sigmas == slice(None))


def test_half_precision_between_nodes_leads_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "fp16_intermediates", True)
    model = budgeted(flux(), 0.6)
    latent = ksampler(model)
    assert latent["samples"].dtype == torch.float16 and found(model, latent) is last_trace()


def test_two_samplers_on_one_model_are_two_runs() -> None:
    model, other = budgeted(flux(), 0.6), budgeted(flux(), 0.6)
    latents = [ksampler(model, seed) for seed in (1, 2)]
    traces = [found(model, latent) for latent in latents]
    assert len({trace.run for trace in traces}) == 2 and installed(model).id != installed(other).id
    assert [found(other, latent) for latent in latents] == [None, None], "the same latents, under other settings"
    again = ksampler(model, 1)
    assert torch.equal(again["samples"], latents[0]["samples"]) and found(model, again) is last_trace() is not traces[0]


def test_a_model_keeps_its_id_through_other_nodes() -> None:
    model = budgeted(flux(), 0.6)
    assert installed(model.clone()).id == installed(model).id != ""
    assert installed(budgeted(model, 0.7)).id != installed(model).id
    assert found(model, ksampler(model.clone())) is last_trace()


def test_at_full_budget_there_is_no_run() -> None:
    model = budgeted(flux(), 1.0)
    ksampler(model)
    assert installed(model) is None and not [trace for trace in events.STORE.newest_first() if trace.evaluations or trace.fingerprints]


def test_a_run_that_was_stopped_has_no_latent() -> None:
    def stop(*_: object) -> None:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        sample(budgeted(flux(), 0.6), 3, callback=stop)
    assert last_trace().fingerprints == () and last_trace().config and len(last_trace().evaluations) == 1
