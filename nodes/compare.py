"""DyDiT Compare: how far the fast picture is from the dense one."""

from __future__ import annotations

from math import fsum, inf
from typing import Any

import torch
from comfy.utils import ProgressBar
from comfy_api.latest import io

from ..dydit_core.compare import FULL_SCALE, Likeness, decibels, difference, measure, pairs, refusal
from .report import percent
from .schema import schema

CEILING = 100.0  # dB: a number that a link can carry for pictures that are the same
# What a PSNR tends to look like, from this many decibels on. It averages over the picture, so a rule of thumb is all it can be.
_WORDS = {40.0: "hard to tell apart side by side", 30.0: "small differences, seen when looked for",
          20.0: "differences that show at first sight", -inf: "far apart, much of the picture has changed"}
_SCALE = f"dark blue is no difference, yellow is {percent(FULL_SCALE)} of the range from black to white, or more"


class DyDiTCompare(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTCompare",
            display_name="DyDiT Compare",
            description="How far pictures drawn on a budget are from the dense ones: a number, and a picture of where.",
            search_aliases=["psnr", "ssim", "image difference", "compare images", "quality metric"],
            inputs=[
                io.Image.Input("image", tooltip="The fast picture, or a batch of them, pixels from 0 to 1; alpha is left out. "
                               "Example: what VAE Decode gives after DyDiT Budget at 0.75."),
                io.Image.Input("reference", tooltip="What it is held to, in the same size in pixels: as many pictures, or one for all. "
                               "Example: the same seed without DyDiT Budget."),
            ],
            outputs=[
                io.Image.Output("difference", display_name="difference",
                                tooltip="Where they differ (mean of red, green and blue). The scale is fixed, so that a colour means the "
                                        f"same in every run: {_SCALE}."),
                io.Float.Output("psnr", display_name="psnr",
                                tooltip="PSNR in dB, from the squared error of the whole batch; higher is nearer. At most "
                                        f"{CEILING:g}, which is also what identical pictures get. Example: 38.5."),
                io.Float.Output("ssim", display_name="ssim",
                                tooltip="Structural similarity, the mean over the batch; 1 is identical. Example: 0.97."),
                io.String.Output("report", display_name="report",
                                 tooltip="Both numbers and the scale in plain words, for Preview as Text."),
            ],
        )

    @classmethod
    def execute(cls, image: Any, reference: Any) -> io.NodeOutput:
        reason = refusal(image, reference)
        if reason:
            raise ValueError(f"DyDiT Compare: {reason}.")
        rows = max(len(image), len(reference))
        pictures = image.new_empty(rows, *image.shape[1:3], 3, dtype=torch.float32)
        found, progress = [], ProgressBar(rows)
        for row, pair in enumerate(pairs(image, reference)):
            pictures[row] = difference(*pair)
            found.append(measure(*pair))
            progress.update(1)
        psnr = min(decibels(fsum(one.mse for one in found) / rows), CEILING)
        ssim = fsum(one.ssim for one in found) / rows
        return io.NodeOutput(pictures, psnr, ssim, "\n".join(_report(found, psnr, ssim)))


def _report(found: list[Likeness], psnr: float, ssim: float) -> list[str]:
    largest, many = max(one.largest for one in found), len(found) > 1
    scale = f"Colours of the difference: {_SCALE}."
    if largest == 0:
        return [f"Identical: red, green and blue are the same in every pixel{f' of all {len(found)} pictures' if many else ''} "
                f"(the output psnr is then {CEILING:g}, ssim 1).", scale]
    lines = [f"PSNR {_db(psnr)}{f' over {len(found)} pictures' if many else ''}: as a rule of thumb, {_word(psnr)}.",
             f"SSIM {min(ssim, 0.9999):.4f}, where 1 is identical."]
    if many:
        worst = max(range(len(found)), key=lambda row: found[row].mse)
        lines.append(f"Farthest from its reference: picture {worst + 1} of {len(found)}, {_db(decibels(found[worst].mse))}.")
    most = percent(largest) if largest >= 0.001 else "less than 0.1 %"
    return [*lines, f"{scale} The largest here is {most}."]


def _db(value: float) -> str:
    return f"{value:.1f} dB" if value < CEILING else f"{CEILING:g} dB or more"


def _word(psnr: float) -> str:
    return next(word for least, word in _WORDS.items() if psnr >= least)
