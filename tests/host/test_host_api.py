"""Prompts in API format, without a browser: the host's own executor runs them, and the nodes give what the trace holds."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from tiny import last_trace  # first: starts the host
from queueing import queue

import nodes as host_nodes
from comfy_api.latest import io
from comfy_extras.nodes_sd3 import EmptySD3LatentImage
from dydit_pack.dydit_core.colours import cividis
from dydit_pack.dydit_core.demo.files import BASE_FILE, WEIGHTS
from dydit_pack.nodes import folders
from dydit_pack.nodes.budget import DyDiTBudget
from dydit_pack.nodes.heatmap import DyDiTHeatmap
from dydit_pack.nodes.prompt import DyDiTScenePrompt
from dydit_pack.nodes.sheet import DyDiTSweepSheet
from dydit_pack.nodes.sweep import DyDiTSweep

pytestmark = pytest.mark.skipif(not (WEIGHTS / BASE_FILE).exists(), reason="the demo's weights are not in this checkout")


class Kept:
    """A node at the end of a prompt that keeps what it was given."""

    def __init__(self) -> None:
        self.values: dict[str, object] = {}
        kept = self.values

        class Keep(io.ComfyNode):
            @classmethod
            def define_schema(cls) -> io.Schema:
                inputs = [io.Image.Input("image"), io.Mask.Input("mask", optional=True), io.String.Input("report", force_input=True)]
                return io.Schema(node_id="Keep", inputs=inputs, outputs=[], is_output_node=True)

            @classmethod
            def execute(cls, **values: object) -> io.NodeOutput:
                kept.update(values)
                return io.NodeOutput()

        self.node = Keep


class Picture(io.ComfyNode):
    """Three channels of a latent as a picture, in place of a VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(node_id="Picture", inputs=[io.Latent.Input("latent")], outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(0.5 + 0.1 * latent["samples"][:, :3].movedim(1, -1))


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> Kept:
    folders.register()
    end = Kept()
    for name, node in {"Keep": end.node, "Picture": Picture, **{node.__name__: node for node in (
            DyDiTBudget, DyDiTHeatmap, DyDiTScenePrompt, DyDiTSweep, DyDiTSweepSheet, EmptySD3LatentImage)}}.items():
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, name, node)
    return end


def graph(budget: object, model: list) -> dict:
    """A picture of the demo model up to the sampler, as node 6."""
    advanced = {"method": "auto", "substitute": "auto", "start_percent": 0.0, "end_percent": 1.0, "min_keep": 0.1, "branch_share": 1.0}
    sampler = {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    return {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": BASE_FILE.name, "weight_dtype": "default"}},
        "2": {"class_type": "DyDiTBudget", "inputs": {"model": model, "budget": budget, **advanced}},
        "3": {"class_type": "DyDiTScenePrompt", "inputs": {"prompt": "a red house on the left, day, meadow"}},
        "4": {"class_type": "DyDiTScenePrompt", "inputs": {"prompt": ""}},
        "5": {"class_type": "EmptySD3LatentImage", "inputs": {"width": 128, "height": 160, "batch_size": 1}},
        "6": {"class_type": "KSampler", "inputs": {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0], **sampler}},
    }


def test_a_heatmap(kept: Kept) -> None:
    queue({
        **graph(0.6, ["1", 0]),
        "7": {"class_type": "DyDiTHeatmap", "inputs": {"model": ["2", 0], "latent": ["6", 0], "step": 2, "block": 0, "branch": "both", "opacity": 1.0}},
        "8": {"class_type": "Keep", "inputs": {"image": ["7", 0], "mask": ["7", 1], "report": ["7", 2]}},
    })
    trace, mask = last_trace(), kept.values["mask"]
    assert mask.shape == (1, 160, 128) and torch.equal(kept.values["image"][0], cividis(mask[0]))
    tokens = trace.evaluations[1].mask().mean((0, 1)).reshape(10, 8)
    assert np.abs(mask[0, 8::16, 8::16].numpy() - tokens).max() < 1e-3
    assert "step 2 of 3" in kept.values["report"] and "Asked 60 %" in kept.values["report"]


def test_a_sweep(kept: Kept) -> None:
    """The host repeats what comes after the list, and hands the sheet all of it at once."""
    queue({
        **graph(["9", 1], ["9", 0]),
        "9": {"class_type": "DyDiTSweep", "inputs": {"model": ["1", 0], "budgets": "1.0, 0.8, 0.7"}},
        "11": {"class_type": "Picture", "inputs": {"latent": ["6", 0]}},
        "12": {"class_type": "DyDiTSweepSheet", "inputs": {"image": ["11", 0], "model": ["2", 0], "latent": ["6", 0]}},
        "13": {"class_type": "Keep", "inputs": {"image": ["12", 0], "report": ["12", 2]}},
    })
    lines = kept.values["report"].splitlines()
    assert [line.split(":")[0].split(",")[0] for line in lines[:3]] == ["budget 100 %", "budget 80 %", "budget 70 %"]
    assert all(re.search(r"\d\.\d\d s", line) for line in lines[:3]), "all three were timed"
