"""The nodes as this host shows them, and as a host does that knows fewer words."""

from __future__ import annotations

import asyncio
import inspect
from dataclasses import fields
from enum import Enum

import pytest
from tiny import as_node  # first: starts the host

import dydit_pack
import folder_paths
from comfy_api.latest import io
from dydit_pack.dydit_core.demo.files import WEIGHTS
from dydit_pack.nodes.adapter import DyDiTAdapterLoader
from dydit_pack.nodes.budget import DyDiTBudget
from dydit_pack.nodes.checkpoint import DyDiTCheckpointLoader
from dydit_pack.nodes.compare import DyDiTCompare
from dydit_pack.nodes.heatmap import DyDiTHeatmap
from dydit_pack.nodes.label import DyDiTClassLabel
from dydit_pack.nodes.sheet import DyDiTSweepSheet
from dydit_pack.nodes.sweep import DyDiTSweep
from dydit_pack.nodes.prompt import DyDiTScenePrompt
from dydit_pack.nodes.prompts import DyDiTPrompts
from dydit_pack.nodes.save import DyDiTSaveAdapter
from dydit_pack.nodes.save_examples import DyDiTSaveExamples
from dydit_pack.nodes.train import DyDiTTrain
from dydit_pack.nodes.video import DyDiTEmptyVideo
from dydit_pack.nodes.schema import lenient

NODES = [DyDiTBudget, DyDiTAdapterLoader, DyDiTCheckpointLoader, DyDiTHeatmap, DyDiTCompare, DyDiTSweep, DyDiTSweepSheet, DyDiTClassLabel,
         DyDiTEmptyVideo, DyDiTScenePrompt, DyDiTPrompts, DyDiTTrain, DyDiTSaveAdapter, DyDiTSaveExamples]


def test_what_the_host_loads() -> None:
    extension = asyncio.run(dydit_pack.comfy_entrypoint())
    assert asyncio.run(extension.get_node_list()) == NODES
    assert dydit_pack.WEB_DIRECTORY == "./web"
    for kind in ("dydit", "diffusion_models", "vae", "loras"):
        assert str(WEIGHTS / kind) in folder_paths.get_folder_paths(kind)


@pytest.mark.parametrize("node", NODES)
def test_every_word_on_a_node_is_there(node: type[io.ComfyNode]) -> None:
    """What tests of an older host take away must be there on this one."""
    schema = node.define_schema()
    schema.validate()
    assert schema.search_aliases and schema.description.endswith(".") and schema.category == "DyDiT"
    for part in (*schema.inputs, *schema.outputs):
        assert part.tooltip and part.tooltip.endswith("."), part
    info = as_node(node).GET_NODE_INFO_V1()
    assert info["name"] == schema.node_id and info["display_name"] == schema.display_name


def test_the_budget_is_one_slider() -> None:
    schema = {part.id: part for part in DyDiTBudget.define_schema().inputs}
    assert list(schema) == ["model", "adapter", "budget", "method", "substitute", "start_percent", "end_percent", "min_keep", "branch_share",
                            "protect", "prefer"]
    shown = [name for name, part in schema.items() if not part.advanced]
    assert shown == ["model", "adapter", "budget", "protect", "prefer"]
    assert all(schema[name].optional for name in ("adapter", "protect", "prefer"))
    slider = DyDiTBudget.GET_NODE_INFO_V1()["input"]["required"]["budget"][1]
    assert {key: slider[key] for key in ("default", "min", "max", "step")} == {"default": 0.75, "min": 0.2, "max": 1.0, "step": 0.01}
    assert "slider" in slider["display"] and slider["gradient_stops"]


def test_defaults_are_what_execute_takes() -> None:
    """A graph saved as API sends every input by name."""
    for node in NODES:
        wanted = set(inspect.signature(node.execute).parameters)
        assert {part.id for part in node.define_schema().inputs} == wanted


def older(make: type, *without: str) -> type:
    """`make` as an older host has it: arguments `without` are a TypeError."""
    known = [name for name in inspect.signature(make).parameters if name not in without]

    class Older(make):
        def __init__(self, *args: object, **kwargs: object) -> None:
            unknown = set(kwargs) - set(known)
            if unknown:
                raise TypeError(f"unexpected keyword argument {unknown}")
            super().__init__(*args, **kwargs)

    Older.__signature__ = inspect.Signature([inspect.signature(make).parameters[name] for name in known])
    Older.__name__ = make.__name__
    return Older


@pytest.mark.parametrize("node", NODES)
def test_a_host_that_knows_fewer_words(node: type[io.ComfyNode], monkeypatch: pytest.MonkeyPatch) -> None:
    """0.8.0 lacks these; a keyword they do not know would keep the whole pack from loading."""
    complete = node.define_schema()
    for kind in (io.Boolean, io.Combo, io.Float, io.Int, io.String):
        monkeypatch.setattr(kind, "Input", older(kind.Input, "advanced", "gradient_stops"))
    monkeypatch.setattr(io, "Schema", older(io.Schema, "search_aliases"))
    monkeypatch.setattr(io, "NumberDisplay", Enum("NumberDisplay", {"number": "number", "slider": "slider"}))

    with pytest.raises(TypeError):
        io.Float.Input("budget", advanced=True)
    with pytest.raises(TypeError):
        io.Schema("Node", search_aliases=["a"])
    schema = node.define_schema()
    schema.validate()
    assert [part.id for part in schema.inputs] == [part.id for part in complete.inputs]
    assert [part.tooltip for part in schema.inputs] == [part.tooltip for part in complete.inputs]
    assert not schema.search_aliases and not any(part.advanced for part in schema.inputs)
    same = {field.name for field in fields(complete)} - {"inputs", "outputs", "search_aliases", "hidden"}
    assert all(getattr(schema, name) == getattr(complete, name) for name in same)


def test_arguments_in_their_place_are_never_dropped() -> None:
    assert lenient(lambda name, default=0: (name, default), "x", default=3, advanced=True) == ("x", 3)
