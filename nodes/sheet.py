"""DyDiT Sweep Sheet: the pictures of a sweep side by side, with their numbers, and PSNR over seconds."""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io
from PIL import Image
from torch import Tensor

from ..dydit_core.compare import decibels, measure, pairs, refusal
from ..dydit_core.plot import Point, around, scatter
from ..dydit_core.sheet import contact_sheet
from .compare import CEILING
from .host import installed
from .report import percent
from .schema import schema
from .sweep import run_of


@dataclass(frozen=True)
class Result:
    """One budget of a sweep: `spent` and `seconds` (an evaluation) are None where the run is no longer kept."""

    asked: float
    spent: float | None
    seconds: float | None
    psnr: float
    picture: Tensor

    def lines(self, dense: float | None) -> list[str]:
        """Budget and quality, then time."""
        spent = f", spent {percent(self.spent)}" if self.spent is not None and self.asked < 1.0 else ""
        faster = f", {dense / self.seconds:.2f} times as fast" if dense and self.seconds and self.asked < 1.0 else ""
        return [f"budget {percent(self.asked)}{spent}",
                ("dense" if self.asked == 1.0 else f"{self.psnr:.1f} dB to dense") + (f", {self.seconds:.2f} s{faster}" if self.seconds else "")]


class DyDiTSweepSheet(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTSweepSheet",
            display_name="DyDiT Sweep Sheet",
            description="The pictures of a DyDiT Sweep side by side with what they cost, and a chart of quality over time.",
            search_aliases=["contact sheet", "xy plot", "benchmark", "grid"],
            inputs=[
                io.Image.Input("image", tooltip="The finished pictures of the sweep, from VAE Decode."),
                io.Model.Input("model", tooltip="The MODEL of DyDiT Budget, as the sampler got it."),
                io.Latent.Input("latent", tooltip="The sampler's LATENT; it tells which runs are meant."),
            ],
            outputs=[
                io.Image.Output("sheet", display_name="sheet", tooltip="All pictures with budget, PSNR to the dense one and seconds under each."),
                io.Image.Output("chart", display_name="chart", tooltip="PSNR to the dense picture in dB over seconds an evaluation, one dot for each budget."),
                io.String.Output("report", display_name="report", tooltip="The numbers as a table, for Preview as Text."),
            ],
            is_input_list=True,
        )

    @classmethod
    def execute(cls, image: list[Tensor], model: list[Any], latent: list[dict]) -> io.NodeOutput:
        results = sorted(_results(image, model, latent), key=lambda result: -result.asked)
        dense = next(result.seconds for result in results if result.asked == 1.0)
        captions = [result.lines(dense) for result in results]
        sheet = contact_sheet([_to_pil(result.picture) for result in results], captions)
        report = "\n".join([*(": ".join(lines) for lines in captions),
                            "Seconds are of one model evaluation, the mean over a run, held to the dense run on this machine. The lowest budget ran "
                            "first and paid for starting up: change the seed and queue again for steady seconds."])
        return io.NodeOutput(to_image(sheet), to_image(_chart(results)), report)


def _results(image: list[Tensor], model: list[Any], latent: list[dict]) -> list[Result]:
    if not len(image) == len(model) == len(latent):
        raise ValueError(f"DyDiT Sweep Sheet: it got {len(image)} pictures, {len(model)} models and {len(latent)} latents; connect all three from the same sweep.")
    asked = [1.0 if (settings := installed(one)) is None else settings.budget for one in model]
    if 1.0 not in asked:
        raise ValueError("DyDiT Sweep Sheet: no run of this sweep is dense; connect the budget output of DyDiT Sweep to the budget of DyDiT Budget, with 1.0 among its budgets.")
    reference, results = image[asked.index(1.0)], []
    for budget, pictures, one, samples in zip(asked, image, model, latent):
        reason = refusal(pictures, reference)
        if reason:
            raise ValueError(f"DyDiT Sweep Sheet: {reason}.")
        errors = [measure(*pair).mse for pair in pairs(pictures, reference)]
        mse = fsum(errors) / len(errors)
        run = run_of(one, samples["samples"])
        facts = run.facts if run is not None else {"achieved": None, "seconds_per_step": None}
        results.append(Result(budget, facts["achieved"], facts["seconds_per_step"], min(decibels(mse), CEILING), pictures[0]))
    return results


def _chart(results: list[Result]) -> Image.Image:
    """Of those whose seconds are known; the dense picture is its own reference and has no dot."""
    timed = [result for result in results if result.seconds and result.asked < 1.0]
    points = [Point(result.seconds, result.psnr, percent(result.asked)) for result in timed]
    dense = [result.seconds for result in results if result.seconds and result.asked == 1.0]
    title = "Quality over time" + (f" (dense: {dense[0]:.2f} s)" if dense else "")
    seconds = around("seconds an evaluation", [*dense, *(point.x for point in points), 1e-3], zero=True)
    return scatter(title, seconds, around("PSNR to dense, dB", [point.y for point in points] or [0.0, CEILING]), points)


def _to_pil(picture: Tensor) -> Image.Image:
    return Image.fromarray((picture[..., :3].clamp(0, 1) * 255).round().byte().cpu().numpy())


def to_image(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)[None]
