"""DyDiT Prompts: a list of prompts, one a line."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..dydit_core.demo.prompt import encode
from .prompt import listed
from .schema import schema

NODE = "DyDiT Prompts"
_EXAMPLE = "a red house on the left, day, meadow\na yellow sailboat on the right, sea, sunset"


class DyDiTPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTPrompts",
            display_name=NODE,
            description="Many prompts at once, one a line, for DyDiT Train; with a CLIP for any model, without one in the words of the demo model.",
            search_aliases=["prompt list", "batch prompts", "captions"],
            inputs=[
                io.Clip.Input("clip", optional=True, tooltip="The text encoders of the model. Without one the lines are read in the demo model's own words. "
                              "Example: Load CLIP with type flux."),
                io.String.Input("prompts", multiline=True, default=_EXAMPLE, tooltip="One prompt a line; empty lines are passed over. Example: a red house on the left, day, meadow."),
            ],
            outputs=[io.Conditioning.Output(is_output_list=True, tooltip="One after the other, for the positive input of DyDiT Train.")],
        )

    @classmethod
    def execute(cls, prompts: str, clip: Any = None) -> io.NodeOutput:
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise ValueError(f"{NODE}: prompts is empty; write at least one line, for example: a red house on the left, day, meadow.")
        if clip is not None:
            return io.NodeOutput([clip.encode_from_tokens_scheduled(clip.tokenize(line)) for line in lines])
        encoded = [encode(line) for line in lines]
        unknown = list(dict.fromkeys(word for each in encoded for word in each.unknown_words))
        if unknown:
            raise ValueError(f"{NODE}: the demo model does not know {listed(unknown)}; connect the CLIP of your model, or keep to the words in the help of "
                             "DyDiT Scene Prompt.")
        return io.NodeOutput([[[each.context[None], {"pooled_output": each.pooled[None]}]] for each in encoded])
