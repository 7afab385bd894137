"""DyDiT Class Label: what a model without prompts is to draw."""

from __future__ import annotations

from comfy_api.latest import io

from ..dydit_core.demo import classes as demo
from ..dydit_core.demo import moving
from ..dydit_core.imagenet import imagenet
from .classes import NODE, conditioning
from .schema import lenient, schema

_NONE = "none (for negative)"
_LARGEST = 99_999


def choices() -> dict[str, tuple[int | None, str]]:
    """Number and name of each entry of the list."""
    found: dict[str, tuple[int | None, str]] = {_NONE: (None, "")}
    for pattern, names in (("{1} (demo)", demo.NAMES), ("{1} (demo video)", moving.NAMES), ("{0} {1}", imagenet())):
        found |= {pattern.format(number, name): (number, name) for number, name in enumerate(names)}
    return found


class DyDiTClassLabel(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTClassLabel",
            display_name=NODE,
            description="What a DiT, DyDiT, SiT or Latte is to draw: one of its classes, or none for the negative input.",
            search_aliases=["imagenet", "class conditional", "class to conditioning", "dit label"],
            inputs=[
                lenient(io.Combo.Input, "class_name", options=list(choices()), default="207 golden retriever",
                        tooltip="The class, by number or name: open the list and type a part of it. With a number: ImageNet's, for the models of the DiT, DyDiT and "
                                "SiT authors; demo and demo video: the classes of the demo's own; none: for the negative input. Example: 207 golden retriever."),
                lenient(io.Int.Input, "number", default=-1, min=-1, max=_LARGEST, advanced=True,
                        tooltip="The class by its number alone, for a model with other classes; from 0 on, it takes the place of class_name. "
                                "-1 leaves the choice to class_name. Example: 207."),
            ],
            outputs=[io.Conditioning.Output(tooltip="For positive or negative of a KSampler with a model of DyDiT Checkpoint Loader.")],
        )

    @classmethod
    def execute(cls, class_name: str, number: int) -> io.NodeOutput:
        if not -1 <= number <= _LARGEST:
            raise ValueError(f"{NODE}: number is {number}; it must be from 0 to {_LARGEST}, or -1 for class_name.")
        if number >= 0:
            return io.NodeOutput(conditioning(number))
        known = choices()
        if class_name not in known:
            raise ValueError(f'{NODE}: class_name is "{class_name}", which is no entry of the list; choose one, or give its number.')
        return io.NodeOutput(conditioning(*known[class_name]))
