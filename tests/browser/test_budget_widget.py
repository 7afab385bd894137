"""The token map on the DyDiT Budget node, used as an artist uses it, in a real ComfyUI and a real browser."""

import base64
import re

import numpy as np
import pytest
from hosting import require_import

require_import("playwright.sync_api", "numpy", "PIL")

from editor import RUN_TIMEOUT  # noqa: E402
from PIL import Image  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

# What the map showed over time: one entry for every change of what it says about itself.
WATCH = """(map) => {
    window.seen = []
    const note = () => seen.push({ ...map.dataset, map: map.querySelector('canvas').toDataURL(),
        blocks: map.querySelector('.dydit-body').toDataURL() })
    new MutationObserver(note).observe(map, { attributes: true, attributeFilter: ['data-steps', 'data-state'] })
}"""


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def whole_percent(share: float) -> int:
    return round(100 * share) if share in (0, 1) else min(max(round(100 * share), 1), 99)


def grid_of(frame: dict) -> np.ndarray:
    return np.frombuffer(base64.b64decode(frame["grid"]), np.uint8).reshape(frame["rows"], frame["cols"])


def uneven(trace: dict, editor) -> dict:
    """The step with the most varied map: what is read off it cannot be right by chance. With its map."""
    steps = [{**step, **editor.trace(trace["run"], f"/{step['step']}/mean")} for step in trace["steps"]]
    return max(steps, key=lambda step: len(np.unique(grid_of(step))))


def kept(trace: dict, step: int, block: int) -> float:
    """Share of the tokens that a block computed, as the summary has it: the mean of both prompts."""
    at = step * len(trace["blocks"]) + block
    return float(np.mean([base64.b64decode(trace["kept"][branch])[at] for branch in trace["branches"]])) / 255


def assert_painted(editor, shown: dict) -> None:
    """The canvas has this map: more computed is never darker."""
    grid, pixels = grid_of(shown), editor.pixels()
    assert pixels.shape[:2] == grid.shape
    brightness = pixels @ np.array([0.2126, 0.7152, 0.0722])
    order = np.argsort(grid, axis=None)
    assert (np.diff(brightness.ravel()[order]) > -2).all()
    equal = np.diff(grid.ravel()[order]) == 0
    assert (np.diff(brightness.ravel()[order])[equal] == 0).all()


@pytest.fixture(scope="module")
def first_run(editor, demo):
    name = editor.drop(demo)
    return name, editor.run()


@pytest.fixture
def ran(editor, first_run):
    """The demo workflow, dropped on the canvas, run once, and on screen. The tab's name and the run's trace."""
    editor.tab(first_run[0])
    return first_run


def test_the_map_fills_while_sampling(editor, demo):
    editor.drop(demo)
    expect(editor.map).to_contain_text("No map yet")

    editor.drag_budget(editor.budget(), 0.6)
    assert 0.5 < editor.budget() < 0.7

    editor.map.evaluate(WATCH)
    trace = editor.run()
    seen = editor.page.evaluate("() => seen")
    live = [entry for entry in seen if entry["state"] == "running" and 0 < int(entry["steps"]) < len(trace["steps"])]
    assert live, [(entry["state"], entry["steps"]) for entry in seen]
    assert len({entry["map"] for entry in seen}) > 1
    assert live[0]["blocks"] != seen[-1]["blocks"]  # the matrix grew
    assert trace["asked"] == pytest.approx(editor.budget(), abs=0.005)
    assert editor.screen().std() > 5
    editor.screenshot("ran")


def test_the_numbers_are_those_of_the_trace(editor, ran):
    _, trace = ran
    total, step = len(trace["steps"]), uneven(trace, editor)
    editor.page.mouse.click(*editor.step_position(step["step"], total))
    expect(editor.map).to_have_attribute("data-step", str(step["step"]))
    expect(editor.map).to_have_attribute("data-map", "shown")
    text = plain(editor.map.inner_text())
    assert f"step {step['step'] + 1} of {total}" in text
    assert f"tokens {whole_percent(step['computed'])} % · FLOPs {whole_percent(step['flops'])} %" in text
    for line in trace["lines"]:
        assert plain(line) in text
    assert_painted(editor, step)

    grid = grid_of(step)
    row, col = np.unravel_index(grid.argmax(), grid.shape)
    editor.page.mouse.move(*editor.cell(row, col, step))
    share = whole_percent(grid[row, col] / 255)
    expect(editor.map).to_contain_text(f"{share}\u00a0% · row {row + 1}, column {col + 1}")


def test_scrubbing_with_mouse_and_keys_moves_only_the_step(editor, ran):
    _, trace = ran
    total, page = len(trace["steps"]), editor.page
    place = editor.node_position()

    editor.drag(editor.step_position(total - 1, total), editor.step_position(0, total))
    expect(editor.map).to_have_attribute("data-step", "0")
    expect(editor.map).to_have_attribute("data-follow", "false")
    keys = [("ArrowRight", 1), ("End", total - 1), ("Home", "mean"), ("Delete", "mean"), ("ArrowRight", 0), ("End", total - 1)]
    for key, step in keys:
        page.keyboard.press(key)
        expect(editor.map).to_have_attribute("data-step", str(step))
    expect(editor.map).to_have_attribute("data-follow", "true")

    expect(editor.map).to_have_attribute("data-map", "shown")
    page.keyboard.press("Shift+Tab")  # from the steps back to the map
    page.keyboard.press("ArrowDown")
    row, col = (trace["rows"] - 1) // 2 + 1, (trace["cols"] - 1) // 2 + 1
    expect(editor.map).to_contain_text(f"row {row}, column {col}")
    page.keyboard.press("ArrowRight")
    expect(editor.map).to_contain_text(f"row {row}, column {col + 1}")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    expect(editor.map).to_contain_text("point at a token")
    assert editor.node_position() == place


def test_a_click_in_the_matrix_opens_that_step_and_block(editor, ran):
    _, trace = ran
    place, block = editor.node_position(), len(trace["blocks"]) - 1
    editor.page.mouse.click(*editor.matrix_position(1, block, trace))
    for name, value in [("step", "1"), ("block", str(block)), ("map", "shown")]:
        expect(editor.map).to_have_attribute(f"data-{name}", value)
    assert_painted(editor, editor.trace(trace["run"], f"/1/{block}"))
    expect(editor.map.locator("select")).to_have_value(str(block))
    expect(editor.map).to_contain_text(f"tokens {whole_percent(kept(trace, 1, block))}\u00a0%")
    editor.screenshot("block")

    editor.page.keyboard.press("ArrowUp")
    expect(editor.map).to_have_attribute("data-block", str(block - 1))
    editor.page.keyboard.press("Escape")
    expect(editor.map).to_have_attribute("data-block", "mean")
    expect(editor.map).to_have_attribute("data-follow", "true")
    assert editor.node_position() == place


def test_the_prompts_can_be_seen_apart(editor, ran):
    _, trace = ran
    assert trace["branches"] == ["cond", "uncond"]  # the demo workflow samples at cfg 2
    editor.map.get_by_role("radio", name="positive prompt (cond)", exact=True).check()
    for name, value in [("branch", "cond"), ("map", "shown")]:
        expect(editor.map).to_have_attribute(f"data-{name}", value)
    assert_painted(editor, editor.trace(trace["run"], f"/{len(trace['steps']) - 1}/mean?branch=cond"))
    editor.page.keyboard.press("ArrowRight")
    expect(editor.map).to_have_attribute("data-branch", "uncond")
    editor.map.get_by_role("radio", name="positive and negative prompt, mean").check()
    expect(editor.map).to_have_attribute("data-branch", "mean")


def test_scrubbing_fast_does_not_flood_the_server(editor, ran):
    _, trace = ran
    asked, open_now, most = [], set(), []
    editor.page.on("request", lambda request: "/dydit/trace/" in request.url and (
        asked.append(request.url), open_now.add(request), most.append(len(open_now))))
    for event in ("requestfinished", "requestfailed"):
        editor.page.on(event, lambda request: open_now.discard(request))
    editor.drag(editor.matrix_position(0, 0, trace), editor.matrix_position(3, len(trace["blocks"]) - 1, trace))
    expect(editor.map).to_have_attribute("data-map", "shown")
    assert len(asked) == len(set(asked))
    assert max(most, default=0) <= 1
    editor.page.keyboard.press("Escape")


def test_the_picture_of_the_run_lies_under_its_map(editor, ran):
    picture = editor.part("cells img").first
    expect(picture).to_be_visible()
    size = editor.page.evaluate("(image) => [image.naturalWidth, image.naturalHeight]", picture.element_handle())
    assert size == [256, 256]  # the picture itself, and not a preview of it
    fade = editor.map.get_by_role("slider", name="Fade from the map to the picture of this run")
    fade.fill("0")
    alone = editor.screen()
    fade.fill("100")
    assert np.abs(editor.screen().astype(int) - alone).mean() > 10
    expect(fade).to_have_attribute("aria-valuetext", re.compile(r"^map 0.%, picture 100.%$"))
    editor.screenshot("picture")
    fade.fill("30")


def test_two_runs_are_compared(editor, ran):
    first = editor.data("run")
    editor.button("Pin").click()
    expect(editor.map).to_have_attribute("data-pinned", first)
    editor.run()
    expect(editor.map).to_have_attribute("data-side", "both")
    expect(editor.part("cells").locator("visible=true")).to_have_count(2)
    text = plain(editor.part("numbers").inner_text())
    assert "A: asked" in text and "B: asked" in text
    editor.page.mouse.click(*editor.step_position(1, 4))
    expect(editor.part("numbers")).to_contain_text("step 2 of 4")
    editor.screenshot("compared")
    editor.map.get_by_role("radio", name="Run A, pinned").check()
    expect(editor.map).to_have_attribute("data-run", first)
    editor.map.get_by_role("radio", name="Both runs, side by side").check()
    editor.button("Unpin").click()
    expect(editor.part("cells").locator("visible=true")).to_have_count(1)


def test_a_picture_to_share_is_copied_or_saved(editor, ran):
    editor.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=editor.url)
    editor.button("Copy").click()
    expect(editor.part("said")).to_have_text("Copied")
    kinds = editor.page.evaluate("async () => (await navigator.clipboard.read()).flatMap((item) => item.types)")
    assert kinds == ["image/png"]

    editor.page.evaluate("() => Object.defineProperty(navigator, 'clipboard', { value: undefined, configurable: true })")
    with editor.page.expect_download() as download:
        editor.button("Copy").or_(editor.button("Copied")).click()
    assert download.value.suggested_filename == "dydit-map.png"
    assert Image.open(download.value.path()).size[0] > 500
    editor.page.evaluate("() => delete navigator.clipboard")


def test_details_fold_away_and_stay_so(editor, ran):
    editor.button("Details").click()
    expect(editor.part("body")).to_be_hidden()
    editor.load()
    editor.show_node()
    expect(editor.part("body")).to_be_hidden()
    expect(editor.map).to_have_attribute("data-map", "shown")
    editor.button("Details").click()
    expect(editor.part("body")).to_be_visible()


def test_nothing_of_the_map_is_saved_or_sent(editor, ran, demo):
    saved = editor.page.evaluate("() => app.graph.serialize()")
    node = next(node for node in saved["nodes"] if str(node["id"]) == editor.node_id())
    shipped = next(node for node in demo["nodes"] if str(node["id"]) == editor.node_id())
    assert len(node["widgets_values"]) == len(shipped["widgets_values"])
    assert "token_map" not in str(saved)
    assert ran[1]["run"] not in str(saved)
    prompt = editor.page.evaluate("async () => (await app.graphToPrompt()).output")
    assert "token_map" not in str(prompt[editor.node_id()])


def test_undo_and_redo_keep_the_map(editor, ran):
    _, trace = ran
    here = editor.node_position()
    title = (editor.map.bounding_box()["x"] + 120, 120 + editor.canvas_top() - 15)
    changes = editor.undoable()
    editor.drag(title, (title[0] + 80, title[1] + 40))
    editor.wait_until_undoable(changes + 1)
    there = editor.node_position()
    assert there != here
    for keys, place in [("Control+z", here), ("Control+y", there), ("Control+z", here)]:
        editor.page.keyboard.press(keys)
        editor.wait_for_node_at(place)  # by then it is another node: undo makes the whole graph anew
        expect(editor.map).to_have_attribute("data-steps", str(len(trace["steps"])))
        assert editor.screen().std() > 5


def test_a_run_draws_in_its_own_tab_only(editor, ran, demo):
    first, _ = ran
    second = editor.drop(demo)
    expect(editor.map).to_contain_text("No map yet")
    editor.tab(first)
    before = editor.data("run")
    editor.reseed()
    editor.press_run()
    expect(editor.map).not_to_have_attribute("data-run", before, timeout=RUN_TIMEOUT)
    editor.tab(second)  # while it is sampling
    expect(editor.map).to_have_attribute("data-steps", "0")
    editor.tab(first)
    editor.wait_until_done()
    editor.tab(second)
    expect(editor.map).to_have_attribute("data-steps", "0")
    editor.tab(first)


def test_a_reload_refills_the_map_from_the_server(editor, ran):
    steps, run, picture = editor.data("steps"), editor.data("run"), editor.pixels()
    editor.load()
    editor.show_node()
    expect(editor.map).to_have_attribute("data-run", run)
    expect(editor.map).to_have_attribute("data-steps", steps)
    expect(editor.map).to_have_attribute("data-map", "shown")
    assert (editor.pixels() == picture).all()


def test_a_cached_rerun_refills_an_empty_map(editor, ran):
    run, steps = editor.data("run"), editor.data("steps")
    editor.context.route("**/api/dydit/**", lambda route: route.abort())
    editor.load()
    editor.show_node()
    expect(editor.map).to_have_attribute("data-steps", "0")
    editor.context.unroute("**/api/dydit/**")
    editor.press_run()
    expect(editor.map).to_have_attribute("data-run", run, timeout=30_000)
    expect(editor.map).to_have_attribute("data-steps", steps)
    expect(editor.map).to_have_attribute("data-map", "shown")


def test_wheel_and_middle_button_over_the_map_move_the_canvas(editor, ran):
    page = editor.page
    view = lambda: page.evaluate("() => [app.canvas.ds.scale, ...app.canvas.ds.offset]")  # noqa: E731
    middle = editor.cell(0, 0, {"rows": 1, "cols": 1})
    before = view()
    editor.drag(middle, (middle[0] + 60, middle[1] + 20), button="middle")
    panned = view()
    assert panned[1] - before[1] == pytest.approx(60, abs=10)
    page.mouse.wheel(0, 120)
    page.wait_for_function("(scale) => app.canvas.ds.scale < scale", arg=panned[0])
    editor.show_node()


# WCAG's relative luminance of colours painted over one another.
LUMINANCE = """(...layers) => {
    const context = Object.assign(document.createElement('canvas'), { width: 1, height: 1 }).getContext('2d')
    for (const colour of layers) { context.fillStyle = colour; context.fillRect(0, 0, 1, 1) }
    const [r, g, b] = [...context.getImageData(0, 0, 1, 1).data].map((c) => c / 255)
        .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
}"""
# Every text on the map with its contrast to what lies behind it.
CONTRASTS = f"""(map) => {{
    const luminance = {LUMINANCE}
    const ground = getComputedStyle(map).backgroundColor
    const texts = [...map.querySelectorAll('.dydit-row, .dydit-row *, .dydit-axes > span, .dydit-side, .dydit-status *')]
        .filter((e) => e.textContent && e.checkVisibility())
    const behind = (e) => (e === map ? [] : [...behind(e.parentElement), getComputedStyle(e).backgroundColor])
    return texts.map((e) => {{
        const layers = [ground, ...behind(e)]
        const [dark, light] = [luminance(...layers), luminance(...layers, getComputedStyle(e).color)].sort((a, b) => a - b)
        return [e.textContent, (light + 0.05) / (dark + 0.05)]
    }})
}}"""


@pytest.mark.parametrize("palette", ["light", "dark"])
def test_text_is_readable_in_both_palettes(editor, ran, palette):
    editor.page.evaluate("(name) => app.extensionManager.setting.set('Comfy.ColorPalette', name)", palette)
    is_painted = "ground > 0.4" if palette == "light" else "ground < 0.1"
    editor.page.wait_for_function(
        f"(map) => {{ const ground = ({LUMINANCE})(getComputedStyle(map).backgroundColor); return {is_painted} }}",
        arg=editor.map.element_handle(),
    )
    editor.screenshot(palette)
    faint = [entry for entry in editor.map.evaluate(CONTRASTS) if entry[1] < 4.5]
    assert not faint, faint


def test_a_node_in_a_subgraph_shows_its_own_run(editor, demo):
    editor.drop(demo)
    inner = editor.page.evaluate(
        """(type) => {
            const budget = app.graph.nodes.find((node) => node.comfyClass === type)
            const { node } = app.graph.convertToSubgraph(new Set([budget]))
            app.canvas.openSubgraph(node.subgraph, node)
            return String(node.id)
        }""",
        "DyDiTBudget",
    )
    editor.show_node()
    editor.map.evaluate(WATCH)
    editor.page.evaluate(
        """() => { for (const node of app.rootGraph.nodes) for (const widget of node.widgets ?? [])
            if (['seed', 'noise_seed'].includes(widget.name)) widget.value = Math.floor(Math.random() * 1e9) }"""
    )
    editor.press_run()
    trace = editor.wait_until_done()
    assert trace["node"].startswith(f"{inner}:")
    expect(editor.part("cells img").first).to_be_visible()  # the picture was decoded outside the subgraph
    assert any(entry["state"] == "running" and int(entry["steps"]) > 0 for entry in editor.page.evaluate("() => seen"))
