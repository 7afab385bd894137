"""DyDiT Scene Prompt: the demo model's own language, without a text encoder."""

from __future__ import annotations

from comfy_api.latest import io

from ..dydit_core.demo.prompt import encode
from .schema import lenient, schema

_EXAMPLE = "a red house on the left and a yellow sailboat on the right, sea, sunset"


class DyDiTScenePrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTScenePrompt",
            display_name="DyDiT Scene Prompt",
            description="A prompt for the demo model dydit_demo. Its words are listed in this node's help.",
            search_aliases=["demo prompt", "scene prompt"],
            inputs=[
                lenient(io.String.Input, "prompt", multiline=True, default=_EXAMPLE,
                        tooltip=f"One or two objects with colour and place, the ground and the time of day. Empty: no prompt, "
                                f"for the negative input. Example: {_EXAMPLE}."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For a KSampler that uses dydit_demo.")],
        )

    @classmethod
    def execute(cls, prompt: str) -> io.NodeOutput:
        encoded = encode(prompt)
        if encoded.unknown_words:
            raise ValueError(
                f"DyDiT Scene Prompt: the demo model does not know {listed(encoded.unknown_words)}. "
                "The words it knows are in this node's help."
            )
        return io.NodeOutput([[encoded.context[None], {"pooled_output": encoded.pooled[None]}]])


def listed(words: list[str]) -> str:
    quoted = [f'"{word}"' for word in words]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
