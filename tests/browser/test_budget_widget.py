"""The token map on the DyDiT Budget node, used as an artist uses it, in a real ComfyUI and a real browser."""

import numpy as np
import pytest
from hosting import require_import

require_import("playwright.sync_api", "numpy", "PIL")

from editor import RUN_TIMEOUT  # noqa: E402
from playwright.sync_api import expect  # noqa: E402

# What the map showed over time: one entry for every change of what it says about itself.
WATCH = """(map) => {
    window.seen = []
    const note = () => seen.push({ ...map.dataset, map: map.querySelector('canvas').toDataURL() })
    new MutationObserver(note).observe(map, { attributes: true, attributeFilter: ['data-frames', 'data-state'] })
}"""


def plain(text: str) -> str:
    return text.replace("\u00a0", " ")


def whole_percent(share: float) -> int:
    return round(100 * share) if share in (0, 1) else min(max(round(100 * share), 1), 99)


def grid_of(frame: dict) -> np.ndarray:
    import base64

    return np.frombuffer(base64.b64decode(frame["grid"]), np.uint8).reshape(frame["rows"], frame["cols"])


def uneven(trace: dict) -> dict:
    """The frame with the most varied map: what is read off it cannot be right by chance."""
    return max(trace["frames"], key=lambda frame: len(np.unique(grid_of(frame))))


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
    live = [entry for entry in seen if entry["state"] == "running" and 0 < int(entry["frames"]) < len(trace["frames"])]
    assert live, [(entry["state"], entry["frames"]) for entry in seen]
    assert len({entry["map"] for entry in seen}) > 1
    assert trace["asked"] == pytest.approx(editor.budget(), abs=0.005)
    assert editor.screen().std() > 5
    editor.screenshot("ran")


def test_the_numbers_are_those_of_the_trace(editor, ran):
    _, trace = ran
    total, frame = len(trace["frames"]), uneven(trace)
    editor.page.mouse.click(*editor.step_position(frame["step"], total))
    expect(editor.map).to_have_attribute("data-step", str(frame["step"]))
    expect(editor.map).to_contain_text(f"step {frame['step'] + 1} of {total}")
    text = plain(editor.map.inner_text())
    assert f"{whole_percent(frame['computed'])} % of tokens · {whole_percent(frame['flops'])} % of FLOPs" in text
    for line in trace["lines"]:
        assert plain(line) in text

    grid, pixels = grid_of(frame), editor.pixels()
    assert pixels.shape[:2] == grid.shape
    brightness = pixels @ np.array([0.2126, 0.7152, 0.0722])
    order = np.argsort(grid, axis=None)
    assert (np.diff(brightness.ravel()[order]) > -2).all()  # more computed is never darker

    row, col = np.unravel_index(grid.argmax(), grid.shape)
    editor.page.mouse.move(*editor.cell(row, col, frame))
    share = whole_percent(grid[row, col] / 255)
    expect(editor.map).to_contain_text(f"row {row + 1}, column {col + 1}: computed in {share} % of blocks")


def test_scrubbing_with_mouse_and_keys_moves_only_the_step(editor, ran):
    _, trace = ran
    total, page = len(trace["frames"]), editor.page
    place = editor.node_position()

    editor.drag(editor.step_position(total - 1, total), editor.step_position(0, total))
    expect(editor.map).to_have_attribute("data-step", "0")
    expect(editor.map).to_have_attribute("data-follow", "false")
    for key, step in [("ArrowRight", 1), ("End", total - 1), ("Home", 0), ("Delete", 0), ("End", total - 1)]:
        page.keyboard.press(key)
        expect(editor.map).to_have_attribute("data-step", str(step))
    expect(editor.map).to_have_attribute("data-follow", "true")

    page.keyboard.press("Shift+Tab")  # from the steps back to the map
    page.keyboard.press("ArrowDown")
    first = plain(editor.map.inner_text())
    page.keyboard.press("ArrowRight")
    frame = trace["frames"][-1]
    row, col = (frame["rows"] - 1) // 2 + 1, (frame["cols"] - 1) // 2 + 1
    assert f"row {row}, column {col}:" in first
    expect(editor.map).to_contain_text(f"row {row}, column {col + 1}:")
    page.keyboard.press("Delete")
    page.keyboard.press("Escape")
    expect(editor.map).to_contain_text("point at a token")
    assert editor.node_position() == place


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
        expect(editor.map).to_have_attribute("data-frames", str(len(trace["frames"])))
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
    expect(editor.map).to_have_attribute("data-frames", "0")
    editor.tab(first)
    editor.wait_until_done()
    editor.tab(second)
    expect(editor.map).to_have_attribute("data-frames", "0")
    editor.tab(first)


def test_a_reload_refills_the_map_from_the_server(editor, ran):
    frames, run, picture = editor.data("frames"), editor.data("run"), editor.pixels()
    editor.load()
    editor.show_node()
    expect(editor.map).to_have_attribute("data-run", run)
    expect(editor.map).to_have_attribute("data-frames", frames)
    assert (editor.pixels() == picture).all()


def test_a_cached_rerun_refills_an_empty_map(editor, ran):
    run, frames = editor.data("run"), editor.data("frames")
    editor.context.route("**/api/dydit/**", lambda route: route.abort())
    editor.load()
    editor.show_node()
    expect(editor.map).to_have_attribute("data-frames", "0")
    editor.context.unroute("**/api/dydit/**")
    editor.press_run()
    expect(editor.map).to_have_attribute("data-run", run, timeout=30_000)
    expect(editor.map).to_have_attribute("data-frames", frames)


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
# Every text on the map with its contrast to the map's background.
CONTRASTS = f"""(map) => {{
    const luminance = {LUMINANCE}
    const ground = getComputedStyle(map).backgroundColor
    const texts = [...map.querySelectorAll('.dydit-row, .dydit-row *, .dydit-status *')].filter((e) => e.textContent)
    return texts.map((e) => {{
        const [dark, light] = [luminance(ground), luminance(ground, getComputedStyle(e).color)].sort((a, b) => a - b)
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
    assert any(entry["state"] == "running" and int(entry["frames"]) > 0 for entry in editor.page.evaluate("() => seen"))
