"""The workflow with the small DySiT that ships, and its twin, in a real ComfyUI and a real browser, at several budgets."""

import json

import numpy as np
import pytest
from hosting import PACK, require_import

require_import("playwright.sync_api", "numpy", "PIL", "torch")

from playwright.sync_api import expect  # noqa: E402
from test_budget_widget import assert_painted, grid_of, plain  # noqa: E402

WORKFLOW = PACK / "workflows" / "dydit_demo_classes.json"
STEPS, SIT = 6, "dydit_demo_sit.safetensors"


def workflow(file: str, *budget: float | str) -> dict:
    """With another file and other first values of DyDiT Budget: budget, method."""
    workflow = json.loads(WORKFLOW.read_text())
    values = {node["type"]: node.get("widgets_values") for node in workflow["nodes"]}
    values["DyDiTCheckpointLoader"][0] = file
    values["DyDiTBudget"][: len(budget)] = budget
    values["KSampler"][2] = STEPS
    return workflow


def maps_of(editor, trace: dict) -> list[np.ndarray]:
    return [grid_of(editor.trace(trace["run"], f"/{step['step']}/mean")) for step in trace["steps"]]


@pytest.mark.parametrize("file", [SIT, "dydit_demo_dit.safetensors"])
def test_the_map_follows_the_budget_and_the_steps(editor, file):
    shares = []
    for budget in (0.75, 0.4):
        editor.drop(workflow(file, budget))
        trace = editor.run()
        assert trace["achieved"] == pytest.approx(budget, abs=0.02)
        assert trace["branches"] == ["cond", "uncond"] and len(trace["blocks"]) == 7 and len(trace["steps"]) == STEPS
        maps = maps_of(editor, trace)
        assert len({grid.tobytes() for grid in maps}) > 1 and any(len(np.unique(grid)) > 1 for grid in maps)
        assert_painted(editor, editor.trace(trace["run"], f"/{STEPS - 1}/mean"))
        expect(editor.part("cells img").first).to_be_visible()
        shares.append(np.mean(maps))
        editor.screenshot(f"classes-{file.split('.')[0]}-{budget}")
    assert shares[0] > shares[1]


def test_the_files_own_threshold_takes_no_notice_of_the_slider(editor):
    spent = []
    for budget in (0.9, 0.3):
        editor.drop(workflow(SIT, budget, "checkpoint"))
        editor.press_run()  # without a new seed
        spent.append(editor.wait_until_done()["achieved"])
    assert spent[0] == spent[1] < 0.8
    assert "checkpoint" in plain(editor.map.inner_text())
