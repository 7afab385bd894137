"""A real ComfyUI with this pack in it, and a real browser: one of each for the whole session.

Everything the server writes goes to a temporary base folder, and the pack is a link in its ``custom_nodes``: the
host's own folder stays as it was, and its other custom nodes stay out.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest
from hosting import PACK, require_host, skip_or_fail

START_SECONDS = 400  # half a minute, but importing torch on busy cores takes its time
STEPS = 4
DEMO = PACK / "workflows" / "dydit_demo.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_ARGUMENTS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _wait_for(url: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"{url}/system_stats", timeout=1).read()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"ComfyUI did not start:\n{log.read_text()[-3000:]}", pytrace=False)


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The folder of the running ComfyUI's models, inputs and outputs."""
    return tmp_path_factory.mktemp("comfyui")


@pytest.fixture(scope="session")
def server(base):
    """The address of a running ComfyUI."""
    host, python = require_host()
    (base / "custom_nodes").mkdir()
    (base / "custom_nodes" / "dydit").symlink_to(PACK, target_is_directory=True)
    port, log = _free_port(), base / "server.log"
    command = [
        python, "main.py", "--cpu", "--port", str(port), "--disable-auto-launch", "--disable-api-nodes",
        "--base-directory", base, "--database-url", f"sqlite:///{base / 'comfyui.db'}",
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(command, cwd=host, stdout=output, stderr=subprocess.STDOUT)
        try:
            _wait_for(f"http://127.0.0.1:{port}", process, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(20)


# Not for the session: while Playwright lives, its event loop runs, and later tests could not start one of their own.
@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        skip_or_fail(f"no browser was found (looked for {', '.join(BROWSERS)}); set CHROMIUM")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def demo() -> dict:
    """The workflow that ships with the pack and runs on its built-in model, with fewer steps to save time."""
    workflow = json.loads(DEMO.read_text())
    sampler = next(node for node in workflow["nodes"] if node["type"] == "KSampler")
    sampler["widgets_values"][2] = STEPS
    return workflow


@pytest.fixture(scope="module", params=["classic", "nodes2"])
def editor(request, server, browser, tmp_path_factory):
    """ComfyUI in a browser tab, in both of its canvases. Screenshots go to ``$DYDIT_SHOTS``, if that is set."""
    from editor import Editor

    shots = Path(os.environ.get("DYDIT_SHOTS") or tmp_path_factory.mktemp("shots"))
    editor = Editor(browser, server, request.param == "nodes2", shots)
    yield editor
    editor.screenshot("last")
    editor.context.close()


@pytest.fixture(autouse=True)
def no_errors(editor):
    """No test may leave an error on the page, nor have asked for anything outside this machine."""
    yield
    assert not editor.errors, editor.errors
    assert not editor.outside_requests(), editor.outside_requests()
