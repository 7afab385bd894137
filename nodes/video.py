"""DyDiT Empty Video: the latent that a model of videos starts from."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from ..dydit_core.models.latte import Latte
from .model import unwrapped
from .schema import lenient, schema

NODE = "DyDiT Empty Video"


class DyDiTEmptyVideo(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTEmptyVideo",
            display_name=NODE,
            description="An empty latent for a Latte: its frames and their size are the model's own.",
            search_aliases=["empty latent video", "latte latent", "video latent", "empty latent image"],
            inputs=[
                io.Model.Input("model", tooltip="A Latte, from DyDiT Checkpoint Loader or DyDiT Budget. It was made for so many frames of one size, and draws no others."),
                lenient(io.Int.Input, "batch_size", default=1, min=1, max=4096, tooltip="Videos to draw at once. Example: 1."),
            ],
            outputs=[io.Latent.Output(tooltip="For latent_image of a KSampler. Put LatentCutToBatch (dim t, slice_size 1) between it and VAE Decode: without "
                                      "it, only the first frame is decoded.")],
        )

    @classmethod
    def execute(cls, model: Any, batch_size: int) -> io.NodeOutput:
        transformer = unwrapped(model.get_model_object("diffusion_model"))
        if not isinstance(transformer, Latte):
            raise ValueError(f"{NODE}: this model is no Latte; use the empty latent node that belongs to it, or connect a Latte from DyDiT Checkpoint Loader.")
        if batch_size < 1:
            raise ValueError(f"{NODE}: batch_size is {batch_size}; it must be 1 or more.")
        shape = batch_size, *transformer.config.latent_size
        return io.NodeOutput({"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())})
