"""locales/en/nodeDefs.json is what the nodes say of themselves, and the host serves it with its translations.

`DYDIT_WRITE_DOCS=1` with these tests writes the English file; the other languages are then held to it by
`tests/test_locales.py`, which needs no ComfyUI.
"""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import inside  # noqa: F401 - first: starts the host
import pytest
from hosting import PACK

import folder_paths
from app.custom_node_manager import CustomNodeManager
from comfy_api.latest import io
from dydit_pack import comfy_entrypoint

LOCALES = PACK / "locales"
ENGLISH = LOCALES / "en" / "nodeDefs.json"
COMMAND = "DYDIT_WRITE_DOCS=1 python -m pytest tests/host/test_host_locales.py"


def words_of(node: type[io.ComfyNode]) -> dict[str, Any]:
    """What the frontend looks up for a node. An output without a name of its own is shown by its type, which the host translates."""
    schema = node.define_schema()
    return {
        "display_name": schema.display_name,
        "description": schema.description,
        "inputs": {part.id: {"name": part.display_name or part.id, "tooltip": part.tooltip} for part in schema.inputs},
        "outputs": {str(index): ({"name": part.display_name} if part.display_name else {}) | {"tooltip": part.tooltip}
                    for index, part in enumerate(schema.outputs)},
    }


async def english() -> dict[str, Any]:
    nodes = await (await comfy_entrypoint()).get_node_list()
    return {node.define_schema().node_id: words_of(node) for node in nodes}


def test_the_english_file_says_what_the_nodes_say() -> None:
    expected = json.dumps(asyncio.run(english()), ensure_ascii=False, indent=2) + "\n"
    if os.environ.get("DYDIT_WRITE_DOCS") == "1":
        ENGLISH.write_text(expected, encoding="utf-8")
    assert ENGLISH.read_text(encoding="utf-8") == expected, f"run {COMMAND}, then bring the other languages up to date"


def test_the_host_finds_every_language(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dydit").symlink_to(PACK, target_is_directory=True)
    monkeypatch.setattr(folder_paths, "get_folder_paths", lambda _: [str(tmp_path)])
    served = CustomNodeManager().build_translations()
    assert served == {folder.name: {"nodeDefs": json.loads((folder / "nodeDefs.json").read_text(encoding="utf-8"))} for folder in LOCALES.iterdir()}
