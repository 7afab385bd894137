"""DyDiT Adapter Loader: trained gates from models/dydit."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io

from ..dydit_core.checkpoints.contents import load
from .folders import ADAPTERS
from .schema import AdapterType, lenient, schema


class DyDiTAdapterLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTAdapterLoader",
            display_name="DyDiT Adapter Loader",
            description="Load an adapter for a FLUX, DiT or SiT model from models/dydit: trained gates for tokens, heads and channels, and their TD-LoRA.",
            search_aliases=["load router", "dydit adapter", "token router", "dynamic width", "td-lora"],
            inputs=[
                lenient(io.Combo.Input, "adapter_name", options=folder_paths.get_filename_list(ADAPTERS),
                        tooltip="A .safetensors file in models/dydit, trained for the model it is used with: an adapter, or the "
                                "routers that convert takes from a DyFLUX file. Example: dydit_demo_sdt.safetensors for the demo model."),
            ],
            outputs=[AdapterType.Output(display_name="adapter", tooltip="For the adapter input of DyDiT Budget.")],
        )

    @classmethod
    def execute(cls, adapter_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path(ADAPTERS, adapter_name)
        if path is None:
            raise ValueError(f"DyDiT Adapter Loader: {adapter_name} is not in models/dydit; put the file there and press R.")
        return io.NodeOutput(load(path))

    @classmethod
    def fingerprint_inputs(cls, adapter_name: str) -> float:
        """A file that was replaced is read again."""
        path = folder_paths.get_full_path(ADAPTERS, adapter_name)
        return 0.0 if path is None else os.path.getmtime(path)
