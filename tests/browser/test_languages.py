"""The node, its map and its help page in every language that ships, in a real ComfyUI and a real browser."""

import json

import pytest
from hosting import PACK, require_import

require_import("playwright.sync_api", "numpy", "PIL")

from editor import BUDGET_NODE  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

LANGUAGES = sorted(folder.name for folder in (PACK / "locales").iterdir() if folder.name != "en")
SHOWN = f"""() => ({{
    title: {BUDGET_NODE}.getTitle(), model: {BUDGET_NODE}.inputs[0].localized_name,
    budget: {BUDGET_NODE}.widgets.find((widget) => widget.name === 'budget').label
}})"""


@pytest.fixture(params=LANGUAGES)
def language(request, editor):
    editor.setting("Comfy.Locale", request.param)
    editor.load()
    yield request.param
    editor.setting("Comfy.Locale", "en")


def test_the_node_and_its_help_page(editor, demo, language):
    words = json.loads((PACK / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))["DyDiTBudget"]
    editor.drop(demo)
    inputs = words["inputs"]
    assert editor.page.evaluate(SHOWN) == {
        "title": words["display_name"], "model": inputs["model"]["name"], "budget": inputs["budget"]["name"]}
    expect(editor.map).to_have_attribute("lang", language)
    expect(editor.map).not_to_contain_text("No map yet")

    editor.page.mouse.click(330, 105)  # the title of the node
    editor.page.get_by_test_id("info-button").click()
    heading = (PACK / f"web/docs/DyDiTBudget/{language}.md").read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")
    expect(editor.page.locator(".node-help-content")).to_contain_text(heading)
    editor.screenshot(f"help-{language}")


def test_the_map_follows_the_setting(editor, demo):
    editor.load()
    editor.drop(demo)
    for language in (*LANGUAGES, "en"):
        editor.page.evaluate("(language) => app.extensionManager.setting.set('Comfy.Locale', language)", language)
        expect(editor.map).to_have_attribute("lang", language)
