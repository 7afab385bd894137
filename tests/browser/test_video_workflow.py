"""The workflow with the small Latte that ships, in a real ComfyUI and a real browser, at several budgets: map, frames, videos."""

import json
import urllib.request

import numpy as np
import pytest
from hosting import PACK, require_import

require_import("playwright.sync_api", "numpy", "PIL", "torch")

from playwright.sync_api import expect  # noqa: E402
from test_budget_widget import assert_painted, grid_of  # noqa: E402

WORKFLOW = PACK / "workflows" / "dydit_demo_video.json"
STEPS, FRAMES, SIDE, BLOCKS = 8, 8, 8, 8


def workflow(budget: float) -> dict:
    workflow = json.loads(WORKFLOW.read_text())
    values = {node["type"]: node.get("widgets_values") for node in workflow["nodes"]}
    values["DyDiTBudget"][0], values["KSampler"][2] = budget, STEPS
    return workflow


def saved(editor) -> list[str]:
    """Names of the video files of the last run."""
    with urllib.request.urlopen(f"{editor.url}/history?max_items=1", timeout=10) as response:
        outputs = next(iter(json.load(response).values()))["outputs"].values()
    names = [item["filename"] for output in outputs for item in output.get("images", ())]
    return [name for name in names if name.endswith(".mp4")]


@pytest.mark.parametrize("budget", [0.9, 0.7])
def test_the_video_at_a_budget(editor, budget):
    editor.drop(workflow(budget))
    trace = editor.run()
    assert trace["achieved"] == pytest.approx(budget, abs=0.02)
    assert (trace["frames"], trace["rows"], trace["cols"], len(trace["blocks"])) == (FRAMES, SIDE, SIDE, BLOCKS)
    assert trace["branches"] == ["cond", "uncond"] and len(trace["steps"]) == STEPS
    frames = editor.map.get_by_role("slider", name="Frame shown on the token map")
    for frame in (0, FRAMES - 1):
        frames.fill(str(frame))
        expect(editor.map).to_have_attribute("data-frame", str(frame))
        expect(editor.map).to_have_attribute("data-map", "shown")
        assert_painted(editor, editor.trace(trace["run"], f"/{STEPS - 1}/mean?frame={frame}"))
    expect(editor.part("cells img").first).to_be_visible()  # the frame's own
    maps = [grid_of(editor.trace(trace["run"], f"/{step}/mean?frame={frame}")) for step in range(STEPS) for frame in range(FRAMES)]
    assert len({grid.tobytes() for grid in maps}) > STEPS and any(len(np.unique(grid)) > 1 for grid in maps)
    assert len(saved(editor)) == 2  # what was drawn, and where the compute went
    editor.screenshot(f"video-{budget}")
