"""The token map of a video, in a real ComfyUI and a real browser: its frames by mouse and keys, and their pictures."""

import base64
import json
import urllib.request
from urllib.parse import parse_qs, urlparse

import numpy as np
import pytest
from hosting import require_import

require_import("playwright.sync_api", "numpy", "PIL", "torch")

from playwright.sync_api import expect  # noqa: E402
from test_budget_widget import WATCH, assert_painted, plain  # noqa: E402
from video import LATTE, STEPS, workflow, write_models  # noqa: E402


@pytest.fixture(scope="module")
def ran(base, editor):
    """The trace of a run, and what the map showed while it went on."""
    write_models(base / "models")
    editor.load()  # the lists of files are read once
    editor.drop(workflow())
    editor.map.evaluate(WATCH)
    return editor.run(), editor.page.evaluate("() => seen")


@pytest.fixture
def frames(editor, ran):
    """The slider that chooses a frame."""
    return editor.map.get_by_role("slider", name="Frame shown on the token map")


def set_by_mouse(editor, slider, frame: int) -> None:
    """A range from -1, the mean, to the last frame; its thumb is 16 pixels wide."""
    box = slider.bounding_box()
    x = box["x"] + 8 + (frame + 1) / LATTE.frames * (box["width"] - 16)
    editor.page.mouse.click(x, box["y"] + box["height"] / 2)


def test_the_run_is_one_of_a_video(editor, ran):
    trace, seen = ran
    side = LATTE.side // 2
    assert (trace["frames"], trace["rows"], trace["cols"], len(trace["steps"])) == (LATTE.frames, side, side, STEPS)
    assert trace["blocks"] == ["spatial 0", "temporal 1", "spatial 2", "temporal 3"] and trace["branches"] == ["cond", "uncond"]
    assert trace["achieved"] == pytest.approx(0.6, abs=0.02) or any("is the least this graph can spend" in line for line in trace["lines"])
    assert [entry for entry in seen if entry["state"] == "running" and entry["map"] and int(entry["steps"]) > 0]


def test_frames_are_scrubbed_by_mouse_and_keys(editor, ran, frames):
    trace, _ = ran
    last = len(trace["steps"]) - 1
    expect(frames).to_have_attribute("aria-valuetext", f"mean of {LATTE.frames} frames")
    set_by_mouse(editor, frames, 3)
    shown = [3]
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "Home", "ArrowRight", "End"):
        now = {"ArrowRight": shown[-1] + 1, "ArrowLeft": shown[-1] - 1, "Home": -1, "End": LATTE.frames - 1}[key]
        frames.press(key)
        expect(editor.map).to_have_attribute("data-frame", str(now) if now >= 0 else "mean")
        expect(editor.map).to_have_attribute("data-map", "shown")
        assert_painted(editor, editor.trace(trace["run"], f"/{last}/mean" + (f"?frame={now}" if now >= 0 else "")))
        shown.append(now)
    expect(frames).to_have_attribute("aria-valuetext", f"frame {LATTE.frames} of {LATTE.frames}")
    maps = [base64.b64decode(editor.trace(trace["run"], f"/{last}/mean?frame={frame}")["grid"]) for frame in range(LATTE.frames)]
    assert len(set(maps)) > 1


def test_the_frame_stays_while_steps_and_blocks_are_chosen(editor, ran, frames):
    trace, _ = ran
    set_by_mouse(editor, frames, 4)
    editor.page.mouse.click(*editor.matrix_position(1, 3, trace))
    for name, value in [("step", "1"), ("block", "3"), ("frame", "4"), ("map", "shown")]:
        expect(editor.map).to_have_attribute(f"data-{name}", value)
    assert_painted(editor, editor.trace(trace["run"], "/1/3?frame=4"))
    assert f"block 4 (temporal 3) · frame 5 of {LATTE.frames}" in plain(editor.part("cells").first.get_attribute("aria-label"))
    editor.screenshot("video-block")
    editor.run()
    expect(editor.map).to_have_attribute("data-frame", "4")
    editor.page.keyboard.press("Escape")


def test_frames_are_played_whether_details_are_folded_or_not(editor, ran, frames):
    editor.button("Details").click()
    try:
        frames.fill("-1")
        editor.map.evaluate("""map => { map.seen = ['mean']; new MutationObserver(() => { if (map.seen.at(-1) !== map.dataset.frame) map.seen.push(map.dataset.frame) })
            .observe(map, { attributeFilter: ['data-frame'] }) }""")
        editor.button("Play the frames").click()
        editor.page.wait_for_function("([map, length]) => map.seen.length >= length", arg=[editor.map.element_handle(), LATTE.frames + 3])
        editor.screenshot("video-plays")
        editor.button("Stop playing").click()
        played = [int(frame) for frame in editor.map.evaluate("map => map.seen.slice(1)")]
        assert played == [index % LATTE.frames for index in range(len(played))]  # and from the beginning
    finally:
        editor.button("Details").click()


def test_the_picture_under_the_map_is_that_of_the_frame(editor, ran, frames):
    picture, names = editor.part("cells img").first, []
    for frame in range(LATTE.frames):
        frames.fill(str(frame))
        expect(picture).to_be_visible()
        names.append(parse_qs(urlparse(picture.get_attribute("src")).query)["filename"][0])
    with urllib.request.urlopen(f"{editor.url}/history?max_items=1", timeout=10) as response:
        outputs = next(iter(json.load(response).values()))["outputs"]
    assert names == [image["filename"] for image in outputs["10"]["images"]] and len(set(names)) == LATTE.frames
    assert outputs["12"]["images"][0]["filename"].endswith(".mp4")  # CreateVideo and SaveVideo wrote them too
    editor.screenshot("video-frame")


def test_a_reload_brings_the_frames_back(editor, ran, frames):
    editor.load()
    editor.show_node()
    expect(editor.map).to_have_attribute("data-map", "shown")
    expect(frames).to_be_visible()
    frames.fill("2")
    expect(editor.map).to_have_attribute("data-map", "shown")
    assert_painted(editor, editor.trace(editor.data("run"), f"/{STEPS - 1}/mean?frame=2"))
    assert np.unique(editor.pixels()).size > 1
