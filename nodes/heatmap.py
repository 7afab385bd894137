"""DyDiT Heatmap: where the compute went, as an IMAGE, a MASK and words; for a video, one of each frame."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io

from ..dydit_core.heatmap import paint, spread
from ..dydit_core.trace import Trace, fingerprint, mean_of
from .events import STORE
from .host import installed
from .report import percent
from .schema import lenient, schema

_BRANCHES = {"both": None, "cond (positive)": "cond", "uncond (negative)": "uncond"}
_PIXELS = 8  # of a latent pixel, where no picture says how large it is
_SCALE = "Colours: dark blue is never computed, yellow always; the scale is 0 to 100 % in every run."


class DyDiTHeatmap(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTHeatmap",
            display_name="DyDiT Heatmap",
            description="Which parts of a picture the model computed, as an image over the picture and as a mask; of a video, a batch with one of each for every frame.",
            search_aliases=["token map", "compute map", "attention map", "trace", "where compute went"],
            inputs=[
                io.Model.Input("model", tooltip="The MODEL of DyDiT Budget, as the sampler got it."),
                io.Latent.Input("latent", tooltip="What that sampler gave. It tells which run is meant; the last 8 runs are kept."),
                io.Image.Input("image", optional=True, tooltip="The finished picture, to lie under the map, or all frames of a video. Example: from VAE Decode."),
                _number("step", "Which step (model evaluation) to show, counted from 1; 0 is the mean of all. Example: 12."),
                _number("block", "Which transformer block to show, counted from 1; 0 is the mean of all. Example: 20 is the first single "
                        "block of FLUX.1 dev."),
                io.Combo.Input("branch", options=list(_BRANCHES), default="both",
                               tooltip="With cfg above 1 the model runs for the positive and for the negative prompt. Example: both shows their mean."),
                lenient(io.Float.Input, "opacity", default=0.6, min=0.0, max=1.0, step=0.05,
                        tooltip="How much the map covers the picture, 0 to 1. Example: 0.6. Without a picture the map alone is shown."),
            ],
            outputs=[
                io.Image.Output("heatmap", display_name="heatmap", tooltip=f"The map, over each picture of the batch where there is one; a video has one for each frame. {_SCALE}"),
                io.Mask.Output("mask", display_name="mask", tooltip="The values of the map, one square for each token: 1 was computed in every block, step "
                               "and prompt shown, 0 in none."),
                io.String.Output("report", display_name="report", tooltip="What is shown, and its numbers, for Preview as Text."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, latent: dict, step: int, block: int, branch: str, opacity: float, image: Any = None) -> io.NodeOutput:
        samples = latent["samples"]
        *frames, height, width = samples.shape[2:]
        _check_frames(image, prod(frames), len(samples))
        size = (height * _PIXELS, width * _PIXELS) if image is None else tuple(image.shape[1:3])
        settings, known = installed(model), fingerprint(samples)
        if settings is None and STORE.gave(known):
            raise ValueError("DyDiT Heatmap: this LATENT came of a run with DyDiT Budget, and the MODEL here has none; connect the MODEL of that node.")
        if settings is None:
            shown, grid, lines = np.ones((prod(frames), 1, 1)), (1, 1), ["The budget is 100 % here, or there is no DyDiT Budget, so the model is untouched and everything is computed."]
        else:
            trace = _trace(settings.id, known)
            shown, lines = _map(trace, step, block, _BRANCHES[branch])
            grid = _grid(trace, step)
        patch = -(-height // grid[0]), -(-width // grid[1])
        values = spread(torch.from_numpy(shown).float(), grid, (height / patch[0], width / patch[1]), size)
        return io.NodeOutput(paint(values, image, opacity), values, "\n".join([*lines, _SCALE]))


def _number(name: str, tooltip: str) -> Any:
    return io.Int.Input(name, default=0, min=0, max=100000, tooltip=tooltip)


def _trace(config: str, known: str) -> Trace:
    trace = STORE.find(config, known)
    if trace is None:
        raise ValueError("DyDiT Heatmap: no run of this MODEL that gave this LATENT is kept. Connect the sampler's own LATENT output and the MODEL it "
                         "was given; if they are, the run is older than the last 8: change the seed and queue again.")
    return trace


def _map(trace: Trace, step: int, block: int, branch: str | None) -> tuple[np.ndarray, list[str]]:
    """The maps [frames, rows, columns] that were asked for, and sentences on them."""
    steps = [evaluation.index + 1 for evaluation in trace.evaluations]
    if not steps:
        raise ValueError("DyDiT Heatmap: nothing was recorded in this run, as it was too large to keep; draw a smaller picture or fewer steps.")
    _check("step", step, steps)
    _check("block", block, range(1, len(trace.blocks) + 1))
    try:
        shown = trace.maps(step - 1 if step else None, block - 1 if block else None, branch)
    except LookupError as error:
        raise ValueError(f"DyDiT Heatmap: {error} At cfg 1 only the positive prompt is run; set branch to both.") from None
    what = [f"step {step} of {steps[-1]}" if step else f"the mean of {len(trace.whole)} steps",
            f"block {block} ({trace.blocks[block - 1]})" if block else f"the mean of {len(trace.blocks)} blocks",
            "both prompts" if branch is None and len(trace.branches) > 1 else f"prompt {branch or trace.branches[0]}"]
    if len(shown) > 1:
        what.append(f"one map for each of {len(shown)} frames")
    asked, achieved = trace.facts["asked"], trace.facts["achieved"]
    by = "By the file's own threshold" if trace.facts["ignored"] else f"Asked {percent(asked)}"
    spent = by + (f", spent {percent(achieved)} of the block FLOPs." if achieved is not None else ".")
    return shown, [spent, f"Shown: {', '.join(what)}. {percent(mean_of(shown, _grid(trace, step)))} of the tokens were computed; "
                          f"the least of a place is {percent(float(shown.min()))}, the most {percent(float(shown.max()))}."]


def _check_frames(image: Any, frames: int, videos: int) -> None:
    if image is None or frames == 1 or len(image) in (frames, videos * frames):
        return
    cut = "decode all of them: put LatentCutToBatch (dim t, slice_size 1) between the sampler and VAE Decode"
    remedy = cut if len(image) < frames else "connect them as VAE Decode gave them, cut along t (LatentCutToBatch) and before other nodes add some"
    raise ValueError(f"DyDiT Heatmap: image holds {len(image)} picture{'s' if len(image) != 1 else ''}, and {'the video has' if videos == 1 else f'the {videos} videos have'} "
                     f"{frames} frames{'' if videos == 1 else ' each'}; {remedy}.")


def _grid(trace: Trace, step: int) -> tuple[int, int]:
    """Token rows and columns: a step may have run a prompt for an area alone."""
    return (trace.at(step - 1) if step else trace.whole[0]).grid


def _check(name: str, number: int, there: Sequence[int]) -> None:
    if number and number not in there:
        raise ValueError(f"DyDiT Heatmap: there is no {name} {number}; this run has the {name}s {there[0]} to {there[-1]}, and 0 is their mean.")
