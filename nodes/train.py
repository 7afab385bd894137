"""DyDiT Train: gates for a FLUX model, from prompts alone."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io

from ..dydit_core.plot import Point, Series, around, lines
from ..dydit_core.train.kinds import KINDS
from ..dydit_core.train.router import Recipe, RouterRun
from ..dydit_core.train.session import Job
from .events import Address, current_prompt, workflow_id
from .examples import LATENT, Gathered, gather
from .report import percent
from .schema import AdapterType, lenient, schema
from .sheet import to_image
from .teacher import NODE, fits, refuse, taught, training
from .training import curve_of, run_training, say

_PIXELS = 8  # on a side of a latent pixel
GROUP = 4  # evaluations that are in memory at once
BUDGETS = (0.4, 0.5, 0.6, 0.75, 0.9)
WHAT = {name.replace("+", " + "): kind for name, kind in KINDS.items()}
# With reuse, what one evaluation skips is what the next ones find: they are trained a few in a row.
SUBSTITUTES: dict[str, dict[str, Any]] = {"reuse": {"reuse": True, "window": 2}, "nothing": {}}


def _whole(name: str, default: int, low: int, high: int, tooltip: str, step: int = 1, advanced: bool = False) -> Any:
    return lenient(io.Int.Input, name, default=default, min=low, max=high, step=step, tooltip=tooltip, advanced=advanced, control_after_generate=False)


class DyDiTTrain(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTTrain",
            display_name=NODE,
            description="Train an adapter for a FLUX model from prompts alone: gates that learn which tokens matter. It can be stopped and continued.",
            search_aliases=["train router", "train adapter", "distill", "finetune", "token router"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX model with its LoRAs: FLUX.1 dev, schnell, lite, or the demo model dydit_demo. It is not changed."),
                io.Conditioning.Input("positive", tooltip="The prompts to learn from, one for each line of DyDiT Prompts, or from Make Training Dataset. "
                                      "Example: 50 prompts like those you draw with."),
                io.Conditioning.Input("negative", optional=True, tooltip="The prompt that cfg above 1 steers away from; not used at cfg 1. Example: an empty prompt."),
                io.Latent.Input("latents", optional=True, tooltip="Pictures of one size, one for each prompt; their size takes the place of width and height. "
                                "Example: from Make Training Dataset."),
                _whole("steps", 600, 1, 100_000, "Training steps. More than were taken under this name goes on from there, at a higher learning rate for a while. Example: 600."),
                lenient(io.Combo.Input, "what", options=list(WHAT), default="tokens",
                        tooltip="What is learned. tokens: which image tokens a block computes. widths: also which heads and channels. low-rank: "
                                "also small additions that make up for what is skipped; slowest. Example: tokens."),
                _whole("width", 512, 64, 4096, "Width of the pictures that are trained on, in pixels; larger ones need more memory. Example: 512.", 16),
                _whole("height", 512, 64, 4096, "Height of the pictures that are trained on, in pixels. Example: 512.", 16),
                io.String.Input("name", default="my_adapter", tooltip="Folder in output/dydit_training in which the training is kept, and continued when it is "
                                "queued again with the same inputs. Example: my_adapter."),
                lenient(io.Combo.Input, "substitute", options=list(SUBSTITUTES), default="reuse", advanced=True,
                        tooltip="What will stand in for a skipped token. reuse: what it gave when last computed. nothing: its update is left out, "
                                "as in the DyDiT paper. Example: reuse."),
                lenient(io.String.Input, "sampling_steps", default="4, 8, 20, 28", advanced=True,
                        tooltip="Numbers of sampling steps that it is trained for, separated by commas. Example: 4, 8, 20, 28."),
                _whole("runs", 32, 1, 10_000, "Dense sampling runs to learn from, for each of sampling_steps; made first, and kept in files. Example: 32.", advanced=True),
                _whole("batch", 2 * GROUP, GROUP, 512, f"Evaluations a training step learns from, a multiple of {GROUP}; they need time, not memory. Example: 8.", GROUP, True),
                lenient(io.Float.Input, "learning_rate", default=0.006, min=0.00001, max=1.0, step=0.0001, round=0.00001, advanced=True,
                        tooltip="How far a training step moves the gates; it falls towards the end. Lower it if the loss is no number. Example: 0.006."),
                lenient(io.Float.Input, "cfg", default=1.0, min=1.0, max=30.0, step=0.1, round=0.01, advanced=True,
                        tooltip="Guidance (cfg) of the runs to learn from, as of a KSampler. Example: 1 for FLUX.1 dev, 2 for the demo model."),
                _whole("seed", 0, 0, 2**31 - 1, "Of the noise that the runs start from. Example: 0.", advanced=True),
            ],
            outputs=[AdapterType.Output(display_name="adapter", tooltip="For DyDiT Budget, and for DyDiT Save Adapter."),
                     io.Image.Output("plot", display_name="plot", tooltip="The error at each budget in dB over the training steps.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, model: list[Any], positive: list[list], steps: list[int], what: list[str], width: list[int], height: list[int], name: list[str],
                substitute: list[str], sampling_steps: list[str], runs: list[int], batch: list[int], learning_rate: list[float], cfg: list[float],
                seed: list[int], negative: list[list] | None = None, latents: list[dict] | None = None) -> io.NodeOutput:
        address = Address(str(cls.hidden.unique_id or ""), workflow_id(cls.hidden.extra_pnginfo) or current_prompt()[1])
        with training():
            try:
                folder = folder_of(name[0])
                refuse(model[0])
                if cfg[0] > 1 and not negative:
                    raise ValueError(f"{NODE}: cfg is {cfg[0]:g} and negative is empty; connect an empty prompt to it, or set cfg to 1.")
                gathered = gather(NODE, positive, negative if cfg[0] > 1 else None, latents)
                fits(model[0], *gathered.examples.conditioning)
                recipe = recipe_of(what[0], substitute[0], sampling_steps[0], steps[0], batch[0], learning_rate[0])
                job = Job(recipe, _size(gathered, width[0], height[0]), name[0], WHAT[what[0]].words, runs[0], (cfg[0], cfg[0]), seed=seed[0],
                          taught=taught(model[0], gathered.guidance))
            except ValueError as error:
                say(address, "failed", (str(error),))
                raise
            adapter, run = run_training(model[0], gathered, job, folder, address)
        return io.NodeOutput(adapter, to_image(chart(run, recipe)))


def folder_of(name: str) -> Path:
    if not re.fullmatch(r"[\w-](?:[\w .-]*[\w-])?", name):
        raise ValueError(f'{NODE}: name is "{name[:60]}"; write letters, digits, spaces, - or _, for example my_adapter.')
    return Path(folder_paths.get_output_directory()) / "dydit_training" / name


def recipe_of(what: str, substitute: str, sampling_steps: str, steps: int, batch: int, rate: float) -> Recipe:
    if batch % GROUP:
        raise ValueError(f"{NODE}: batch is {batch}; it must be a multiple of {GROUP}.")
    kind = WHAT[what]
    budgets = (*BUDGETS, 1.0) if kind.adds else BUDGETS
    return Recipe(steps, batch, GROUP, rate, budgets, counts_of(sampling_steps), **SUBSTITUTES[substitute], **kind.parts)


def counts_of(text: str) -> tuple[int, ...]:
    """Numbers of sampling steps, rising."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    if not words or not all(word.isascii() and word.isdecimal() and 2 <= int(word) <= 200 for word in words):
        raise ValueError(f'{NODE}: sampling_steps is "{text[:60]}"; write whole numbers from 2 to 200 with commas between them, for example 4, 8, 20, 28.')
    return tuple(sorted({int(word) for word in words}))


def _size(gathered: Gathered, width: int, height: int) -> tuple[int, int, int]:
    """(C, H, W) of the latents."""
    if gathered.examples.latents is not None:
        return tuple(gathered.examples.latents.shape[1:])
    return LATENT.latent_channels, height // _PIXELS, width // _PIXELS


def chart(run: RouterRun, recipe: Recipe) -> Any:
    points = curve_of(run)
    series = [Series(percent(budget), [Point(step, errors[level], "") for step, errors in points if errors[level] is not None])
              for level, budget in enumerate(recipe.budgets)]
    found = [point.y for one in series for point in one.points] or [-1.0, 0.0]
    steps, errors = around("training step", [float(max(1, run.step))], zero=True), around("error, dB (lower is better)", found)
    return lines("Error at each budget", steps, errors, [one for one in series if one.points], dots=False)
