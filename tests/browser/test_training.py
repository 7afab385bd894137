"""DyDiT Train on the page: the template runs, its plot grows on the node, it is stopped and goes on, and the slider has its adapter."""

import json

import pytest
from hosting import PACK, require_import

require_import("playwright.sync_api", "numpy", "PIL")

from editor import RUN_TIMEOUT  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

STEPS = 8
TRAIN = PACK / "workflows" / "dydit_train.json"
WIDGETS = ["steps", "what", "width", "height", "name", "substitute", "sampling_steps", "runs", "batch", "learning_rate", "cfg", "seed"]
SMALL = {"steps": STEPS, "width": 128, "height": 128, "sampling_steps": "4", "runs": 4}
# A node outside the view has no widgets on the page.
SEE_ALL = """async () => {
    for (let still = 0; still < 5; still++) {
        if (app.canvas.ds.scale !== 0.5) still = 0
        Object.assign(app.canvas.ds, { scale: 0.5, offset: [120, 160] })
        app.canvas.setDirty(true, true)
        await new Promise(requestAnimationFrame)
    }
}"""


@pytest.fixture
def training(editor):
    """The template, made small: its steps, and a name of its own for each canvas."""
    workflow = json.loads(TRAIN.read_text())
    node = next(node for node in workflow["nodes"] if node["type"] == "DyDiTTrain")
    given = {**dict(zip(WIDGETS, node["widgets_values"], strict=True)), **SMALL, "name": f"browser {editor.nodes2}"}
    node["widgets_values"] = list(given.values())
    return workflow


def test_a_training_is_seen_stopped_and_continued(editor, training):
    editor.drop(training)
    editor.page.evaluate(SEE_ALL)
    view = editor.page.locator("[data-testid=dydit-training]:visible")
    expect(view).to_contain_text("Not trained yet")
    editor.press_run()
    expect(view).to_have_attribute("data-state", "training", timeout=RUN_TIMEOUT)
    expect(view.locator("polyline").first).to_be_attached(timeout=RUN_TIMEOUT)
    editor.page.request.post(f"{editor.url}/api/interrupt", data={})
    expect(view).to_have_attribute("data-state", "interrupted", timeout=RUN_TIMEOUT)
    expect(view).to_contain_text("Queue it again to go on.")
    stopped = int(view.get_attribute("data-done"))
    assert 0 < stopped < STEPS

    editor.load()
    editor.show_node()
    editor.page.evaluate(SEE_ALL)
    expect(view).to_have_attribute("data-done", str(stopped))  # a page that knows nothing asks the server
    editor.press_run()
    expect(view).to_have_attribute("data-state", "done", timeout=RUN_TIMEOUT)
    expect(view).to_have_attribute("data-done", str(STEPS))
    assert view.locator("polyline").count() == 5 == view.locator(".dydit-training-legend span").count()
    expect(editor.map).to_have_attribute("data-state", "done", timeout=RUN_TIMEOUT)
    assert "learned tokens × reuse" in editor.map.inner_text()
    editor.screenshot("trained")
