"""Recording takes what the run computed, and would rather lose an evaluation than hold one up."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_runtime import HALVES
from test_width import GROUPS, HEADS, chosen
from toy import BLOCKS, FAMILY, ScriptedRouter, Scene, schedule, scripted_scores
from torch import Tensor

from dydit_core import recorder as recording
from dydit_core.budget import Plan, share_between
from dydit_core.parts import Gate
from dydit_core.recorder import Marks, Recorder, Watch
from dydit_core.runtime import Branches, Method, Run
from dydit_core.substitutes.nothing import Nothing
from dydit_core.trace import Evaluation, Trace

KEEP = (0.5, 0.0, 0.3, 1.0)
SEPARATE = {"uncond": Branches(("u",), slice(0, 0), slice(0, 2)), "cond": Branches(("c",), slice(0, 2), slice(2, 2))}
CPU = torch.device("cpu")


def marks(mask: Tensor, grid: tuple[int, int], cond: bool = True) -> Marks:
    return Marks(mask, grid, (cond,) * mask.shape[1], Watch(None))


def top(block: int, sigma: float, rows: int, count: int) -> np.ndarray:
    """The tokens that the scripted router keeps."""
    best = scripted_scores(block, sigma, rows, 64).topk(count, dim=1).indices
    return torch.zeros(rows, 64, dtype=torch.bool).scatter_(1, best, True).numpy()


def recorded(scene: Scene, router: ScriptedRouter, share: float = 1.0, steps: int = 3) -> tuple[Run, Trace]:
    run, _, evaluations = scene.run(Plan(0.5, min_keep=0.0, branch_share=share), Method(router, Nothing()), schedule(steps))
    return run, Trace("a", {}, evaluations)


def test_a_run_is_recorded_as_it_ran() -> None:
    scene, sigmas, seen = Scene(rows=2), schedule(3), []
    before = threading.active_count()
    recorder = Recorder(seen.append)
    run = Run(Plan(0.5, min_keep=0.0), Method(ScriptedRouter(KEEP), Nothing()), sigmas, recorder)
    for sigma in sigmas:
        scene.evaluate(run, sigma)
    run.finish()
    trace = recorder.finish()
    assert threading.active_count() == before, "the recorder's thread outlives the run"
    assert list(trace) == seen and [part.index for part in trace] == [0, 1, 2]
    assert [part.sigma for part in trace] == sigmas
    assert [part.flops for part in trace] == run.ledger.spent
    assert (recorder.taken, recorder.late) == (3, 0)
    for part, sigma in zip(trace, sigmas):
        assert part.shape == (BLOCKS, 2, 64) and (part.frames, part.grid) == (1, (8, 8))
        assert part.computed == pytest.approx((32 + 0 + 19 + 64) / (BLOCKS * 64))
        for block, fraction in enumerate(KEEP):
            assert (part.mask()[block] == top(block, sigma, 2, round(fraction * 64))).all()


@pytest.mark.parametrize("share", [1.0, 1.6])
def test_each_branch_has_the_mask_that_was_chosen_for_it(share: float) -> None:
    _, trace = recorded(Scene(rows=4, branches=HALVES), ScriptedRouter(KEEP), share)
    for step, sigma in enumerate(schedule(3)):
        for block, fraction in enumerate(KEEP):
            counts = share_between(round(fraction * 64), 64, 2, 2, share)
            for branch, rows, count in zip(("cond", "uncond"), (slice(0, 2), slice(2, 4)), counts):
                expected = top(block, sigma, 4, count)[rows].mean(0).reshape(8, 8)
                assert np.allclose(trace.map(step, block, branch), expected)
                assert trace.at(step).kept[trace.branches.index(branch), block] == pytest.approx(count / 64)


class OneOrTheOther(ScriptedRouter):
    """Keeps the best of half of the tokens in one pass, and the others in the next."""

    sign = 1

    def scores(self, gate: Gate) -> Tensor:
        return self.sign * super().scores(gate)


def test_branches_that_are_run_one_after_the_other() -> None:
    """Uncond first: the map knows whose rows are whose."""
    scene, recorder, router, (sigma, *_) = Scene(rows=2), Recorder(), OneOrTheOther([0.5] * BLOCKS), schedule(2)
    run = Run(Plan(0.5, min_keep=0.0), Method(router, Nothing()), schedule(2), recorder)
    run.arrive(sigma)
    for router.sign, scene.branches in ((1, SEPARATE["uncond"]), (-1, SEPARATE["cond"])):
        with scene.passing(run):
            scene.blocks(*scene.embed(sigma))
    run.finish()
    (part,) = recorder.finish()
    assert part.cond == (False, False, True, True) and part.branches == ("cond", "uncond")
    for block in range(BLOCKS):
        best = top(block, sigma, 2, 32)
        for branch, mask in (("uncond", best), ("cond", ~best)):
            assert np.allclose(part.map(block, branch)[0], mask.mean(0).reshape(8, 8))


class WideRouter(ScriptedRouter):
    """Given widths too, of a router that has some."""

    units = HEADS, GROUPS


@pytest.mark.parametrize("dense_first", [False, True])
def test_heads_and_groups_are_those_that_were_chosen(dense_first: bool) -> None:
    some, of = chosen()
    _, trace = recorded(Scene(rows=2), WideRouter(KEEP, dense_first, some))
    for part in trace.evaluations:
        dense = dense_first and part.index == 0
        for block, (heads, groups) in of.items():
            assert (part.heads.values(block) == (True if dense else heads.numpy())).all()
            assert (part.groups.values(block) == (True if dense else groups.numpy())).all()
        assert part.heads.values().shape == (BLOCKS, HEADS) and part.groups.values().shape == (BLOCKS, GROUPS)


def test_outside_the_window_everything_was_computed() -> None:
    """Where the blocks run untouched, too: the last evaluation here."""
    recorder, sigmas, scene = Recorder(), schedule(4), Scene(rows=4, branches=HALVES)
    some, _ = chosen()
    run = Run(Plan(0.5, start_sigma=0.8, end_sigma=0.4), Method(WideRouter(KEEP, widths=some), Nothing()), sigmas, recorder)
    for sigma in sigmas:
        scene.evaluate(run, sigma)
    run.finish()
    first, second, _, last = recorder.finish()
    assert not second.mask().all() and not second.heads.values().all()
    for part in (first, last):
        assert part.mask().all() and part.flops == part.computed == 1.0 and part.branches == ("cond", "uncond")
        assert part.heads.values().all() and part.groups.values().shape == (BLOCKS, GROUPS)


def test_a_method_without_widths_has_none() -> None:
    _, trace = recorded(Scene(), ScriptedRouter(KEEP))
    assert all(part.heads is None and part.groups is None for part in trace.evaluations)


def test_blocks_have_names() -> None:
    assert FAMILY.names(Scene().model) == ["double 0", "single 0", "single 1", "single 2"]


def test_passes_of_one_evaluation_lie_side_by_side() -> None:
    """References are cut off where one prompt alone has them; an area's pass is left out."""
    recorder, off, on = Recorder(), torch.zeros(2, 1, 6, dtype=torch.bool), torch.ones(2, 3, 8, dtype=torch.bool)
    recorder.take(0, 1.0, 0.5, [marks(off, (2, 3)), marks(on, (2, 3)), marks(on[:, :, :4], (2, 2))])
    (part,) = recorder.finish()
    assert part.shape == (2, 4, 6) and part.computed == 0.75
    assert not part.mask()[:, 0].any() and part.mask()[:, 1:].all()


def test_a_listener_that_fails_loses_no_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    def fail(evaluation: Evaluation) -> None:
        raise OSError("the browser is gone")

    recorder = Recorder(fail)
    for index in range(3):
        recorder.take(index, 0.5, 0.4, [marks(torch.ones(2, 1, 4, dtype=torch.bool), (2, 2))])
    assert [evaluation.index for evaluation in recorder.finish()] == [0, 1, 2]
    assert len([record for record in caplog.records if "could not be shown" in record.message]) == 3


def test_what_comes_too_late_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampling thread is never kept waiting: the listener here stands still until the run is over."""
    monkeypatch.setattr(recording, "PENDING_BYTES", 3 * 64)
    busy, go_on = threading.Event(), threading.Event()

    def stand_still(evaluation: Evaluation) -> None:
        busy.set()
        go_on.wait()

    recorder, mask = Recorder(stand_still), torch.ones(2, 1, 32, dtype=torch.bool)
    for index in range(10):
        recorder.take(index, 0.5, 0.4, [marks(mask, (4, 8))])
        if index == 0:
            busy.wait()
    assert (recorder.taken, recorder.late) == (10, 7)
    go_on.set()
    assert [evaluation.index for evaluation in recorder.finish()] == [0, 1, 2]


def test_an_evaluation_that_is_large_by_itself_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "PENDING_BYTES", 1)
    recorder = Recorder()
    recorder.take(0, 0.5, 0.4, [marks(torch.ones(2, 1, 32, dtype=torch.bool), (4, 8))])
    assert len(recorder.finish()) == 1 and recorder.late == 0


def test_a_run_that_outgrows_its_room_is_kept_at_every_second_step_then_every_fourth() -> None:
    seen, mask = [], torch.ones(2, 1, 32, dtype=torch.bool)
    one = Evaluation.of(0, 1.0, 1.0, mask.numpy(), (True,), (4, 8)).nbytes
    recorder = Recorder(seen.append, limit=5 * one)
    for index in range(20):
        recorder.take(index, 0.5, 0.4, [marks(mask, (4, 8))])
    assert [part.index for part in recorder.finish()] == [0, 4, 8, 12, 16]
    assert [part.index for part in seen] == list(range(20)), "the live map has all"


def ticking() -> Iterator[float]:
    now = 0.0
    while True:
        yield (now := now + 2.0)


def test_seconds_are_those_of_the_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passes of two seconds each on a clock that moves when it is asked; without a device they are unknown."""
    clock, sigmas = ticking(), schedule(2)
    monkeypatch.setattr(recording, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    found = {}
    for device in (CPU, None):
        scene, recorder = Scene(rows=2), Recorder(device=device)
        run = Run(Plan(0.5, start_sigma=0.9), Method(ScriptedRouter(KEEP), Nothing()), sigmas, recorder)
        for sigma in sigmas:
            run.arrive(sigma)
            for scene.branches in SEPARATE.values():
                with scene.passing(run):
                    scene.blocks(*scene.embed(sigma))
        run.finish()
        found[device] = [part.seconds for part in recorder.finish()]
    assert found == {CPU: [4.0, 4.0], None: [None, None]}


def test_seconds_on_a_card_are_read_on_the_recorders_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sampling thread only records events, on the stream of the card that the model is on."""
    recorded_on, waited_on = [], []

    class FakeEvent:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: str) -> None:
            recorded_on.append((stream, threading.current_thread().name))

        def synchronize(self) -> None:
            waited_on.append(threading.current_thread().name)

        def elapsed_time(self, end: FakeEvent) -> float:
            return 250.0

    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: f"the stream of {device}")
    scene, recorder = Scene(), Recorder(device=torch.device("cuda:1"))
    run = Run(Plan(0.5, min_keep=0.0), Method(ScriptedRouter(KEEP), Nothing()), schedule(2), recorder)
    scene.evaluate(run, 1.0)
    run.finish()
    (part,) = recorder.finish()
    assert part.seconds == 0.25 and waited_on == ["dydit-trace"]
    assert recorded_on == [("the stream of cuda:1", threading.current_thread().name)] * 2
