"""One browser tab with ComfyUI in it, as a user handles it: drop a workflow, drag the slider, press Run, look.

What a user does goes through the mouse and the keyboard; ``evaluate`` only reads, or brings the node into view.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import urllib.request
import uuid
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import Browser, expect

NODE_CLASS = "DyDiTBudget"
# Milliseconds for a machine that has much else to do; on an idle one a run takes two seconds, all else less than one.
RUN_TIMEOUT = 180_000
TIMEOUT = 60_000
CORE_HOSTS = ("comfy.org", "huggingface.co")  # the frontend itself asks these two; blocked here like all others
READY = f"""() => window.app?.canvas?.graph && app.extensionManager?.setting
    && window.LiteGraph?.registered_node_types?.{NODE_CLASS}"""
HIDE_TOASTS = """addEventListener('DOMContentLoaded', () => {
    const style = document.createElement('style')
    style.textContent = '.p-toast { display: none !important }'  // they lie over the Run button
    document.head.append(style)
})"""
BUDGET_NODE = f"app.canvas.graph.nodes.find((node) => node.comfyClass === '{NODE_CLASS}')"


class Editor:
    def __init__(self, browser: Browser, url: str, nodes2: bool, shots: Path):
        self.url, self.nodes2, self.shots = url, nodes2, shots
        self.errors: list[str] = []
        self.outside: list[str] = []
        self._names = itertools.count(1)
        self.setting("Comfy.TutorialCompleted", True)  # else the template browser covers everything
        self.setting("Comfy.VueNodes.Enabled", nodes2)
        self.setting("Comfy.ColorPalette", "dark")
        self.context = browser.new_context(viewport={"width": 1280, "height": 900}, reduced_motion="reduce")
        self.context.route(lambda address: not address.startswith((url, "data:", "blob:")), self._refuse)
        self.context.add_init_script(HIDE_TOASTS)
        self.page = self.context.new_page()
        self.page.set_default_timeout(TIMEOUT)
        expect.set_options(timeout=TIMEOUT)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.load()

    def _refuse(self, route) -> None:
        self.outside.append(route.request.url)
        route.abort()

    def outside_requests(self) -> list[str]:
        return [address for address in self.outside if not any(host in address for host in CORE_HOSTS)]

    def setting(self, key: str, value) -> None:
        request = urllib.request.Request(
            f"{self.url}/api/settings/{key}", json.dumps(value).encode(), {"Content-Type": "application/json"}
        )
        urllib.request.urlopen(request, timeout=10).read()

    def load(self) -> None:
        """Open the page, or load it again."""
        self.page.goto(self.url, wait_until="domcontentloaded")
        self.page.wait_for_function(READY, timeout=RUN_TIMEOUT)
        expect(self.page.locator(".p-blockui-mask")).to_have_count(0)  # the loading screen takes clicks while it fades

    # --- workflows

    def drop(self, workflow: dict) -> str:
        """Drop a workflow file on the canvas; it opens in a tab of its own. Returns the tab's name."""
        name = f"drop{next(self._names)}"
        workflow = {**workflow, "id": str(uuid.uuid4())}
        transfer = self.page.evaluate_handle(
            """([text, name]) => {
                const transfer = new DataTransfer()
                transfer.items.add(new File([text], name, { type: 'application/json' }))
                return transfer
            }""",
            [json.dumps(workflow), f"{name}.json"],
        )
        for event in ("dragover", "drop"):
            # at the edge of the canvas: a file dropped on a node would be the node's
            where = {"dataTransfer": transfer, "clientX": 640, "clientY": 880}
            self.page.dispatch_event("#graph-canvas", event, where)
        self.page.wait_for_function(f"(id) => (app.rootGraph ?? app.graph).id === id && {BUDGET_NODE}", arg=workflow["id"])
        self.show_node()
        return name

    def tab(self, name: str) -> None:
        """Click a workflow's tab, unless it is the open one."""
        if self.page.evaluate("() => app.extensionManager.workflow.activeWorkflow?.filename") == name:
            return
        self.page.locator(".workflow-tab", has_text=re.compile(rf"^{name}\b")).click()
        self.page.wait_for_function(
            "(name) => app.extensionManager.workflow.activeWorkflow?.filename === name", arg=name
        )
        self.show_node()

    def show_node(self) -> None:
        """Put the node at the left of the view at its natural size, clear of the tool bars."""
        self.page.wait_for_function(f"() => {BUDGET_NODE}")  # after a reload the workflow comes back by itself
        self.page.evaluate(  # the frontend fits a workflow into view some frames after loading it: outlast that
            f"""async () => {{
                for (let still = 0; still < 5; still++) {{
                    const [x, y] = {BUDGET_NODE}.pos, view = app.canvas.ds, offset = [110 - x, 120 - y]
                    if (view.scale !== 1 || offset.some((value, i) => view.offset[i] !== value)) {{
                        Object.assign(view, {{ scale: 1, offset }})
                        app.canvas.setDirty(true, true)
                        still = 0
                    }}
                    await new Promise(requestAnimationFrame)
                }}
            }}"""
        )
        expect(self.map).to_have_count(1)
        expect(self.map).to_be_in_viewport()

    # --- the node

    @property
    def map(self):
        """The token map on screen. Nodes in other tabs keep theirs in the document, hidden."""
        return self.page.locator("[data-testid=dydit-map]:visible")

    def data(self, name: str) -> str:
        return self.map.get_attribute(f"data-{name}")

    def node_id(self) -> str:
        return str(self.page.evaluate(f"() => {BUDGET_NODE}.id"))

    def node_position(self) -> list[float]:
        return self.page.evaluate(f"() => [...{BUDGET_NODE}.pos]")

    def wait_for_node_at(self, position: list[float]) -> None:
        at = "(place) => place.every((value, i) => node.pos[i] === value)"
        self.page.wait_for_function(f"(place) => {{ const node = {BUDGET_NODE}; return ({at})(place) }}", arg=position)

    def undoable(self) -> int:
        """How many changes the frontend has taken note of; it does so a moment after they are made."""
        return self.page.evaluate("() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length")

    def wait_until_undoable(self, changes: int) -> None:
        self.page.wait_for_function(
            "(count) => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length >= count", arg=changes
        )

    def canvas_top(self) -> float:
        return self.page.locator("#graph-canvas").bounding_box()["y"]

    def budget(self) -> float:
        return self.page.evaluate(f"() => {BUDGET_NODE}.widgets.find((widget) => widget.name === 'budget').value")

    def drag_budget(self, start: float, end: float) -> None:
        """Drag the budget slider with the mouse, from and to a share of its range."""
        if self.nodes2:
            thumb = self.page.locator(f'[data-node-id="{self.node_id()}"] [role=slider]').first
            track = thumb.locator("xpath=..").bounding_box()
            box = thumb.bounding_box()
            x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
            target = track["x"] + end * track["width"]
        else:
            left, y, width = self.page.evaluate(
                f"""() => {{
                    const node = {BUDGET_NODE}, slider = node.widgets.find((widget) => widget.name === 'budget')
                    const {{ offset, scale }} = app.canvas.ds, box = app.canvas.canvas.getBoundingClientRect()
                    const y = node.pos[1] + (slider.last_y ?? slider.y) + 10
                    return [(node.pos[0] + 15 + offset[0]) * scale + box.left, (y + offset[1]) * scale + box.top,
                            (node.size[0] - 30) * scale]
                }}"""
            )
            x, target = left + start * width, left + end * width
        self.drag((x, y), (target, y))

    def drag(self, start: tuple[float, float], end: tuple[float, float], button: str = "left") -> None:
        mouse = self.page.mouse
        mouse.move(*start)
        mouse.down(button=button)
        mouse.move(*end, steps=8)
        mouse.up(button=button)

    def reseed(self) -> None:
        """Change the seed, so that the sampler is not served from the host's cache."""
        self.page.evaluate(
            """() => {
                for (const node of app.graph.nodes)
                    for (const widget of node.widgets ?? [])
                        if (['seed', 'noise_seed'].includes(widget.name)) widget.value = Math.floor(Math.random() * 1e9)
            }"""
        )

    def press_run(self) -> None:
        self.page.get_by_test_id("queue-button").first.click()

    def run(self) -> dict:
        """Sample anew and wait for the end. Returns the run's summary from the server."""
        before = self.data("run")
        self.reseed()
        self.press_run()
        expect(self.map).not_to_have_attribute("data-run", before, timeout=RUN_TIMEOUT)
        return self.wait_until_done()

    def wait_until_done(self) -> dict:
        expect(self.map).to_have_attribute("data-state", "done", timeout=RUN_TIMEOUT)
        trace = self.trace(self.data("run"))
        expect(self.map).to_have_attribute("data-steps", str(len(trace["steps"])))
        expect(self.map).to_have_attribute("data-map", "shown")
        return trace

    def trace(self, run: str, map: str = "") -> dict:
        """The summary of a run, or one map of it: "/<step>/<block>?branch=…"."""
        with urllib.request.urlopen(f"{self.url}/dydit/trace/{run}{map}", timeout=10) as response:
            return json.load(response)

    # --- the map

    def part(self, name: str):
        return self.map.locator(f".dydit-{name}")

    def button(self, name: str):
        return self.map.get_by_role("button", name=name, exact=True)

    def pixels(self, part: str = "cells canvas") -> np.ndarray:
        """The map, or another part, as it is on its canvas, rows × cols × RGB."""
        url = self.part(part).first.evaluate("(canvas) => canvas.toDataURL()")
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))

    def screen(self) -> np.ndarray:
        """The map as it is on the screen."""
        return np.asarray(Image.open(io.BytesIO(self.part("cells").first.screenshot())).convert("RGB"))

    def cell(self, row: int, col: int, frame: dict) -> tuple[float, float]:
        """The middle of a token's cell, in the window."""
        return middle(self.part("cells").first.bounding_box(), row, frame["rows"], col, frame["cols"])

    def step_position(self, step: int, total: int) -> tuple[float, float]:
        """The middle of a step's bar, in the window."""
        return middle(self.part("slider .dydit-steps").last.bounding_box(), 0, 1, step, total)

    def matrix_position(self, step: int, block: int, trace: dict) -> tuple[float, float]:
        """The middle of a step's and block's cell, in the window."""
        return middle(self.part("body").bounding_box(), block, len(trace["blocks"]), step, len(trace["steps"]))

    def screenshot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}-{'nodes2' if self.nodes2 else 'classic'}.png")


def middle(box: dict, row: int, rows: int, col: int, cols: int) -> tuple[float, float]:
    """The middle of one of rows × cols equal parts of a box."""
    return box["x"] + (col + 0.5) / cols * box["width"], box["y"] + (row + 0.5) / rows * box["height"]
