"""What was computed where: nothing is lost in packing, and nothing grows without bound."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from toy import BLOCKS, Scene, ScriptedRouter, schedule, scripted_scores

from dydit_core.budget import Plan
from dydit_core.runtime import Method
from dydit_core.substitutes.nothing import Nothing
from dydit_core.trace import Evaluation, Recorder, Trace, TraceStore


def evaluation(mask: np.ndarray, grid: tuple[int, int]) -> Evaluation:
    return Evaluation(0, 1.0, 0.5, float(mask.mean()), mask.shape, np.packbits(mask), grid)


@pytest.mark.parametrize("shape, grid", [((3, 2, 35), (5, 7)), ((1, 1, 1), (1, 1)), ((57, 1, 4096), (64, 64))])
def test_bits_come_back(shape: tuple[int, int, int], grid: tuple[int, int]) -> None:
    mask = np.random.default_rng(0).random(shape) < 0.3
    packed = evaluation(mask, grid)
    assert packed.bits.nbytes <= mask.size // 8 + 1
    assert (packed.mask() == mask).all()
    assert np.allclose(packed.mean_map(), mask.mean((0, 1)).reshape(grid))


def test_reference_tokens_are_not_on_the_map() -> None:
    mask = np.zeros((2, 1, 12 + 5), dtype=bool)
    mask[:, :, 12:] = True
    assert evaluation(mask, (3, 4)).mean_map().max() == 0.0


@pytest.mark.parametrize("grid, shown", [((256, 256), (64, 64)), ((65, 64), (64, 64)), ((90, 48), (64, 48)), ((1, 130), (1, 64))])
def test_large_maps_shrink_and_keep_their_mean(grid: tuple[int, int], shown: tuple[int, int]) -> None:
    mask = np.zeros((1, 1, grid[0] * grid[1]), dtype=bool)
    mask.reshape(grid)[: grid[0] // 2 + 1] = True
    picture = evaluation(mask, grid).mean_map()
    assert picture.shape == shown
    assert picture[0, 0] == 1.0 and 0.0 <= picture.min() <= picture.max() <= 1.0
    if grid == (256, 256):
        assert picture.mean() == pytest.approx(mask.mean())


def test_a_run_is_recorded_as_it_ran() -> None:
    scene, sigmas, seen = Scene(rows=2), schedule(3), []
    before = threading.active_count()
    keep = (0.5, 0.0, 0.3, 1.0)
    from dydit_core.runtime import Run
    recorder = Recorder(seen.append)
    run = Run(Plan(0.5, min_keep=0.0), Method(ScriptedRouter(keep), Nothing()), sigmas, recorder)
    for sigma in sigmas:
        scene.evaluate(run, sigma)
    run.finish()
    trace = recorder.finish()
    assert threading.active_count() == before, "the recorder's thread outlives the run"
    assert list(trace) == seen and [part.index for part in trace] == [0, 1, 2]
    assert [part.sigma for part in trace] == sigmas
    assert [part.flops for part in trace] == run.ledger.spent
    for part, sigma in zip(trace, sigmas):
        assert part.shape == (BLOCKS, 2, 64) and part.grid == (8, 8)
        assert part.computed == pytest.approx((32 + 0 + 19 + 64) / (BLOCKS * 64))
        for block, fraction in enumerate(keep):
            best = scripted_scores(block, sigma, 2, 64).topk(round(fraction * 64), dim=1).indices
            expected = torch.zeros(2, 64, dtype=torch.bool).scatter_(1, best, True)
            assert (part.mask()[block] == expected.numpy()).all()


def test_passes_of_one_evaluation_lie_side_by_side() -> None:
    recorder = Recorder()
    recorder.take(0, 1.0, 0.5, [torch.zeros(2, 1, 6, dtype=torch.bool), torch.ones(2, 3, 6, dtype=torch.bool)], (2, 3))
    (part,) = recorder.finish()
    assert part.shape == (2, 4, 6) and part.computed == 0.75
    assert not part.mask()[:, 0].any() and part.mask()[:, 1:].all()


def trace(name: str, size: int = 8) -> Trace:
    return Trace(name, {}, (evaluation(np.zeros((1, 1, 8 * size), dtype=bool), (size, 8)),))


def test_the_store_keeps_the_last_eight() -> None:
    store = TraceStore()
    for index in range(10):
        store.put(trace(str(index)))
    assert [found.run for found in store.newest_first()] == [str(index) for index in range(9, 1, -1)]
    assert store.get("1") is None and store.get("9").run == "9"
    store.put(trace("5"))
    assert store.newest_first()[0].run == "5" and len(store.newest_first()) == 8


def test_the_store_is_bounded_in_bytes_but_keeps_the_newest() -> None:
    store = TraceStore(max_bytes=100)
    for name in "abc":
        store.put(trace(name, 40))
    assert [found.run for found in store.newest_first()] == ["c", "b"]
    store.put(trace("large", 500))
    assert [found.run for found in store.newest_first()] == ["large"]


def test_a_listener_that_fails_loses_no_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    def fail(evaluation: Evaluation) -> None:
        raise OSError("the browser is gone")

    recorder = Recorder(fail)
    for index in range(3):
        recorder.take(index, 0.5, 0.4, [torch.ones(2, 1, 4, dtype=torch.bool)], (2, 2))
    assert [evaluation.index for evaluation in recorder.finish()] == [0, 1, 2]
    assert len([record for record in caplog.records if "could not be shown" in record.message]) == 3
