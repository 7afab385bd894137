"""Help pages and shipped workflows, against the nodes as the host defines them."""

from __future__ import annotations

import asyncio
import json
import re
from importlib import import_module

import inside  # noqa: F401 - first: starts the host
import pytest
from hosting import PACK

import nodes as host_nodes
from dydit_pack import comfy_entrypoint

# nodes_post_processing before nodes_latent, which it and that import.
EXTRAS = ("nodes_cond", "nodes_flux", "nodes_sd3", "nodes_primitive", "nodes_image_compare", "nodes_post_processing", "nodes_latent", "nodes_video")
FRONTEND_ONLY = {"MarkdownNote"}
WORKFLOWS = sorted((PACK / "workflows").glob("*.json"))


async def _listed(entrypoint) -> list[type]:
    return await (await entrypoint()).get_node_list()


OURS = {node.define_schema().node_id: node for node in asyncio.run(_listed(comfy_entrypoint))}


def definitions() -> dict[str, type]:
    """Node classes by id: the host's own, of its extras those that our workflows use, and ours."""
    extras = [asyncio.run(_listed(import_module(f"comfy_extras.{name}").comfy_entrypoint)) for name in EXTRAS]
    old_style = import_module("comfy_extras.nodes_preview_any").NODE_CLASS_MAPPINGS
    return {**host_nodes.NODE_CLASS_MAPPINGS, **old_style, **{node.define_schema().node_id: node for group in extras for node in group}, **OURS}


def widgets(inputs: dict) -> list[tuple[str, object, dict]]:
    """(name, type or list of choices, options) of the inputs that are widgets, in the order the frontend makes them; where a choice
    brings inputs of its own, as our workflows leave it: at the first."""
    found = []
    for name, (kind, *options) in [*inputs.get("required", {}).items(), *inputs.get("optional", {}).items()]:
        options = options[0] if options else {}
        if kind == "COMFY_DYNAMICCOMBO_V3" and not options.get("hidden"):
            choices = options["options"]
            found += [(name, [choice["key"] for choice in choices], {}), *widgets(choices[0]["inputs"])]
        if isinstance(kind, list) or kind in {"COMBO", "INT", "FLOAT", "STRING", "BOOLEAN"}:
            found.append((name, options.get("options", kind), options))
            if options.get("control_after_generate"):
                found.append((f"{name} control", ["fixed", "increment", "decrement", "randomize"], {}))
    return found


@pytest.mark.parametrize("node_id", OURS)
def test_the_help_page_speaks_of_every_input_and_output(node_id):
    page = (PACK / "web" / "docs" / f"{node_id}.md").read_text()
    named = set(re.findall(r"^- `(\w+)`", page.partition("## Its words")[0], re.MULTILINE))
    schema = OURS[node_id].define_schema()
    assert named == {part.id for part in schema.inputs} | {part.display_name or part.io_type for part in schema.outputs}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_the_host_knows_every_node_and_value_of_a_workflow(path):
    known = definitions()
    for node in json.loads(path.read_text())["nodes"]:
        if node["type"] in FRONTEND_ONLY:
            continue
        expected, values = widgets(known[node["type"]].INPUT_TYPES()), node.get("widgets_values", [])
        assert len(values) == len(expected), (node["type"], values, [name for name, *_ in expected])
        for (name, kind, options), value in zip(expected, values):
            where = f"{node['type']}.{name} = {value!r}"
            if isinstance(kind, list):
                assert value in kind or str(value).endswith(".safetensors"), where
            elif kind in {"INT", "FLOAT"}:
                assert options["min"] <= value <= options["max"], where
            else:
                assert isinstance(value, bool if kind == "BOOLEAN" else str), where
