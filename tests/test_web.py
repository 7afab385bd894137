"""The widget's JavaScript tests, which need Node.js and nothing else: ``node --test tests/web/*.test.mjs``."""

import shutil
import subprocess
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "web"


@pytest.mark.skipif(shutil.which("node") is None, reason="Node.js is not installed")
def test_javascript():
    files = sorted(str(path) for path in FOLDER.glob("*.test.mjs"))  # what a folder means differs between Node 20 and 22
    assert files
    run = subprocess.run(["node", "--test", *files], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stdout + run.stderr
