"""Where the ComfyUI is that the host and browser tests run against.

The folder is ``$COMFYUI_PATH``, else the ComfyUI this pack is installed in (``…/custom_nodes/<pack>``), else
``~/comfy/ComfyUI``; its Python is ``$COMFYUI_PYTHON``, else the one of the ``.venv`` or ``venv`` beside its ``main.py``.
A machine without ComfyUI skips those tests; ``DYDIT_REQUIRE_HOST=1`` makes such a skip a failure, so that a machine
that is meant to run them cannot go green without having done so.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest

PACK = Path(os.path.abspath(__file__)).parents[1]  # not resolve(): a symlinked pack belongs where the link is


def _candidates() -> list[Path]:
    named = os.environ.get("COMFYUI_PATH")
    if named:
        return [Path(named).expanduser()]  # a wrong path must not quietly fall back to another ComfyUI
    installed = [PACK.parents[1]] if PACK.parent.name == "custom_nodes" else []
    return [*installed, Path.home() / "comfy" / "ComfyUI"]


def host_path() -> Path | None:
    """The ComfyUI folder, or None."""
    for folder in _candidates():
        if (folder / "main.py").is_file() and (folder / "comfy").is_dir():
            return folder.resolve()
    return None


def host_python() -> Path | None:
    """The Python that runs this ComfyUI, or None."""
    named = os.environ.get("COMFYUI_PYTHON")
    if named:
        python = Path(named).expanduser()
        return python if python.is_file() else None
    host = host_path()
    if host is None:
        return None
    layouts = ("bin/python", "Scripts/python.exe")
    found = [host / env / layout for env in (".venv", "venv") for layout in layouts]
    return next((python for python in found if python.is_file()), None)


def skip_or_fail(reason: str) -> None:
    """Skip the running test, fixture or test file; fail instead where ``DYDIT_REQUIRE_HOST=1`` says everything must be here."""
    if os.environ.get("DYDIT_REQUIRE_HOST") == "1":
        pytest.fail(f"DYDIT_REQUIRE_HOST=1, but {reason}", pytrace=False)
    pytest.skip(reason, allow_module_level=True)


def require_host() -> tuple[Path, Path]:
    """The host's folder and its Python, or a skip (a failure under ``DYDIT_REQUIRE_HOST=1``) that says what is missing."""
    host, python = host_path(), host_python()
    if host is None:
        looked = ", ".join(str(folder) for folder in _candidates())
        skip_or_fail(f"no ComfyUI was found (looked at {looked}); set COMFYUI_PATH")
    if python is None:
        skip_or_fail(f"no Python was found for {host} (this one is {sys.executable}); set COMFYUI_PYTHON")
    return host, python


def require_import(*names: str) -> None:
    """Skip (or fail) a test file whose libraries are not installed. Call it before importing them."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            skip_or_fail(str(error))
