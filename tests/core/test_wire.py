"""What the map on the node reads: every number is the trace's own."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
from test_trace import CFG, masks

from dydit_core import wire
from dydit_core.trace import Evaluation, Trace

BLOCKS = ("double 0", "single 0", "single 1")
FACTS = {"v": 2, "run": "a", "state": "done", "lines": ["Asked 50 %"]}


def bytes_of(text: str, *shape: int) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def as_byte(values: np.ndarray) -> np.ndarray:
    return np.rint(255 * values).astype(np.uint8)


def evaluation(index: int, widths: bool = True, cond: tuple[bool, ...] = CFG, seconds: float | None = None) -> Evaluation:
    heads, groups = masks(3, 6, seed=10 + index), masks(3, 9, seed=20 + index)
    return Evaluation.of(index, 1.0 - index / 4, 0.5, masks(3, len(cond), 12, seed=index), cond, (3, 4),
                         *((heads, groups) if widths else ()), seconds=seconds)


def trace(**more: object) -> Trace:
    """Step 2 was not recorded."""
    return Trace("a", FACTS, tuple(evaluation(index, **more) for index in (0, 1, 3)), BLOCKS)


def test_a_live_step() -> None:
    step = evaluation(3)
    told = json.loads(json.dumps(wire.live(step, BLOCKS)))
    assert (bytes_of(told["grid"], 3, 4) == as_byte(step.mean_map())).all()
    for branch, row in (("cond", 0), ("uncond", 1)):
        assert (bytes_of(told["kept"][branch], 3) == as_byte(step.mask()[:, row].mean(1))).all()
    assert (bytes_of(told["heads"], 3) == as_byte(masks(3, 6, seed=13).mean(1))).all()
    assert (bytes_of(told["groups"], 3) == as_byte(masks(3, 9, seed=23).mean(1))).all()
    rest = {key: told[key] for key in told.keys() - {"grid", "kept", "heads", "groups"}}
    assert rest == {"step": 3, "sigma": 0.25, "flops": 0.5, "computed": step.computed, "frames": 1, "each": None, "rows": 3, "cols": 4,
                    "token_rows": 3, "token_cols": 4, "branches": ["cond", "uncond"], "blocks": list(BLOCKS)}


def test_a_live_step_of_a_video_has_its_frames() -> None:
    """Where they are no more together than one map may be: 64 × 64."""
    for grid, told_apart in (((2, 2, 3), True), ((16, 16, 16), True), ((17, 16, 16), False)):
        shape = int(np.prod(grid))
        step = Evaluation.of(0, 0.5, 0.5, masks(3, 2, shape, seed=1), (False, True), grid)
        told = json.loads(json.dumps(wire.live(step, BLOCKS)))
        assert (bytes_of(told["grid"], *grid[1:]) == as_byte(step.mean_map())).all() and told["frames"] == grid[0]
        assert (told["each"] is not None) == told_apart
        if told_apart:
            assert (bytes_of(told["each"], *grid) == as_byte(step.map())).all()


def test_the_summary_is_the_mean_of_the_maps() -> None:
    whole = trace(seconds=1.5)
    told = json.loads(json.dumps(wire.summary(whole)))
    assert {key: told[key] for key in FACTS} == FACTS
    assert [told[key] for key in ("token_rows", "token_cols", "rows", "cols", "frames", "branches", "blocks")] == [
        3, 4, 3, 4, 1, ["cond", "uncond"], list(BLOCKS)]
    assert told["steps"] == [{"step": step.index, "sigma": step.sigma, "flops": 0.5, "computed": step.computed, "seconds": 1.5,
                              "branches": ["cond", "uncond"]} for step in whole.evaluations]
    for branch in told["branches"]:
        means = np.array([[whole.map(step, block, branch).mean() for block in range(3)] for step in (0, 1, 3)])
        assert (bytes_of(told["kept"][branch], 3, 3) == as_byte(means)).all()
    for name, bits in (("heads", [step.heads for step in whole.evaluations]), ("groups", [step.groups for step in whole.evaluations])):
        assert (bytes_of(told[name], 3, 3) == as_byte(np.stack([part.values().mean(1) for part in bits]))).all()


def test_without_widths_or_a_clock() -> None:
    told = wire.summary(trace(widths=False))
    assert told["heads"] is told["groups"] is told["steps"][0]["seconds"] is None
    assert wire.live(evaluation(0, widths=False), BLOCKS)["heads"] is wire.one_map(trace(widths=False), 0, 0)["heads"] is None


def test_a_step_that_did_not_run_a_branch_kept_nothing_there() -> None:
    told = wire.summary(Trace("a", FACTS, (evaluation(0), evaluation(1, cond=(True,))), BLOCKS))
    uncond = bytes_of(told["kept"]["uncond"], 2, 3)
    assert uncond[0].any() and not uncond[1].any() and bytes_of(told["kept"]["cond"], 2, 3)[1].any()


def test_a_run_without_maps_has_its_facts() -> None:
    told = wire.summary(Trace("a", FACTS, ()))
    assert told == {**FACTS, "token_rows": 0, "token_cols": 0, "rows": 0, "cols": 0, "frames": 0, "branches": [], "blocks": [],
                    "steps": [], "kept": {}, "heads": None, "groups": None}


@pytest.mark.parametrize("step", [None, 1, 3])
@pytest.mark.parametrize("block", [None, 0, 2])
@pytest.mark.parametrize("branch", [None, "uncond"])
@pytest.mark.parametrize("frame", [None, 0])
def test_one_map(step: int | None, block: int | None, branch: str | None, frame: int | None) -> None:
    whole = trace()
    told = json.loads(json.dumps(wire.one_map(whole, step, block, branch, frame)))
    expected = whole.map(step, block, branch, frame)
    assert (bytes_of(told.pop("grid"), 3, 4) == as_byte(expected)).all()
    assert told.pop("computed") == pytest.approx(expected.mean(), abs=1e-6)
    single = step is not None and block is not None
    for name, count, seed in (("heads", 6, 10), ("groups", 9, 20)):
        assert told.pop(name) == ("".join(str(int(on)) for on in masks(3, count, seed=seed + step)[block]) if single else None)
    assert told == {"v": 2, "run": "a", "step": "mean" if step is None else step, "block": "mean" if block is None else block,
                    "branch": branch, "frame": frame, "rows": 3, "cols": 4, "token_rows": 3, "token_cols": 4}
