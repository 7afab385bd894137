"""DyDiT Save Examples: prompts and pictures of a graph in a file, for a training without ComfyUI."""

from __future__ import annotations

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..dydit_core.train.examples import save_examples
from .examples import gather
from .save import free_path, write
from .schema import schema

NODE = "DyDiT Save Examples"


class DyDiTSaveExamples(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTSaveExamples",
            display_name=NODE,
            description="Save encoded prompts, and pictures if there are any, for python -m dydit_core train: a training in a shell, on another machine.",
            search_aliases=["export prompts", "training data"],
            inputs=[
                io.Conditioning.Input("positive", tooltip="The prompts to learn from. Example: 50 lines of DyDiT Prompts with the CLIP of FLUX.1 dev."),
                io.Conditioning.Input("negative", optional=True, tooltip="The prompt that guidance above 1 steers away from; zeros without one. Example: an empty "
                                      "CLIP Text Encode."),
                io.Latent.Input("latents", optional=True, tooltip="Pictures of one size, one for each prompt. Example: from Make Training Dataset."),
                io.String.Input("filename_prefix", default="dydit/examples", tooltip="Name of the file in ComfyUI's output folder; a number is added. "
                                "Example: dydit/portraits."),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The whole path of the file, for the option --examples.")],
            is_input_list=True,
            is_output_node=True,
        )

    @classmethod
    def execute(cls, positive: list[list], filename_prefix: list[str], negative: list[list] | None = None, latents: list[dict] | None = None) -> io.NodeOutput:
        with torch.inference_mode(False):
            gathered = gather(NODE, positive, negative, latents)
        path = free_path(NODE, folder_paths.get_output_directory(), filename_prefix[0], "filename_prefix")
        write(NODE, path, lambda partial: save_examples(partial, gathered.examples))
        return io.NodeOutput(str(path), ui=ui.PreviewText(" ".join((str(path), *gathered.notes))))
