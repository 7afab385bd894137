"""Importing this turns the process into a ComfyUI on the CPU with our pack in it, as the package `dydit_pack`.

Import it before anything of `comfy` or `dydit_pack`; a test file that does so is skipped where that cannot be. The
host's folder goes first on the import path, because it and the repository both have a top-level `nodes`; the pack gets
a name of its own, so its relative imports work as in `custom_nodes`. What the host writes goes to a temporary folder.
"""

from __future__ import annotations

import atexit
import shutil
import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from hosting import PACK, require_host, skip_or_fail

HOST, _PYTHON = require_host()
BASE = Path(tempfile.mkdtemp(prefix="dydit-host-"))
atexit.register(shutil.rmtree, BASE, ignore_errors=True)


def _start_host() -> None:
    sys.path.insert(0, str(HOST))
    arguments, sys.argv = sys.argv, ["comfyui", "--cpu", "--base-directory", str(BASE)]
    try:
        import comfy.options

        comfy.options.enable_args_parsing()
        import comfy.sd  # noqa: F401 - its imports are the host's dependencies
    except ImportError as error:
        sys.path.remove(str(HOST))
        skip_or_fail(f"this Python cannot run ComfyUI ({error}); run pytest with {_PYTHON}")
    finally:
        sys.argv = arguments


def _load_pack() -> None:
    spec = spec_from_file_location("dydit_pack", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
    pack = sys.modules["dydit_pack"] = module_from_spec(spec)
    spec.loader.exec_module(pack)


_start_host()
_load_pack()
