"""DyDiT Checkpoint Loader: a FLUX and its token routers from one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..dydit_core.checkpoints.files import is_pickle
from ..dydit_core.checkpoints.fit import sketch
from ..dydit_core.checkpoints.flux_keys import ROUTER
from ..dydit_core.checkpoints.routers import find
from ..dydit_core.checkpoints.source import open_source
from .schema import AdapterType, lenient, schema

_FOLDER = "diffusion_models"


class DyDiTCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTCheckpointLoader",
            display_name="DyDiT Checkpoint Loader",
            description="Load a FLUX that was trained together with token routers (DyFLUX), and the routers, from one file.",
            search_aliases=["dyflux", "dynamic flux", "load dydit"],
            inputs=[
                lenient(io.Combo.Input, "checkpoint_name", options=folder_paths.get_filename_list(_FOLDER),
                        tooltip="A .safetensors file in models/diffusion_models that holds a FLUX and its token routers. Where they "
                                "are two files, as convert writes them, use Load Diffusion Model and DyDiT Adapter Loader. "
                                "Example: dyflux_lite.safetensors."),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The FLUX, for DyDiT Budget."),
                     AdapterType.Output("adapter", display_name="adapter", tooltip="Its routers, for the adapter input of DyDiT Budget.")],
        )

    @classmethod
    def execute(cls, checkpoint_name: str) -> io.NodeOutput:
        path = folder_paths.get_full_path(_FOLDER, checkpoint_name)
        if path is None:
            raise ValueError(f"DyDiT Checkpoint Loader: {checkpoint_name} is not in models/diffusion_models; put the file there and press R.")
        if is_pickle(Path(path)):
            raise ValueError(
                f"DyDiT Checkpoint Loader: {checkpoint_name} is a PyTorch file; run python -m dydit_core convert {path} FOLDER in the "
                "folder of this pack, then use Load Diffusion Model and DyDiT Adapter Loader with the two files it writes."
            )
        routers = find(open_source(Path(path)), title=checkpoint_name)
        model = load_base(path)
        return io.NodeOutput(model, routers.with_base(sketch(model.get_model_object("diffusion_model"))))

    @classmethod
    def fingerprint_inputs(cls, checkpoint_name: str) -> float:
        """A file that was replaced is read again."""
        path = folder_paths.get_full_path(_FOLDER, checkpoint_name)
        return 0.0 if path is None else os.path.getmtime(path)


def load_base(path: str, disable_dynamic: bool = False) -> Any:
    """The MODEL in `path`, as the host's own loader gives it, without the routers, which it does not know."""
    tensors, metadata = comfy.utils.load_torch_file(path, return_metadata=True)
    base = {key: tensors[entry.name] for key, entry in open_source(Path(path)).entries.items() if f".{ROUTER}." not in key}
    model = comfy.sd.load_diffusion_model_state_dict(base, metadata=metadata, disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError(f"DyDiT Checkpoint Loader: {os.path.basename(path)} holds no FLUX that ComfyUI knows; update ComfyUI, or choose another file.")
    model.cached_patcher_init = (load_base, (path,))  # the host loads it again where it wants a copy of its own
    return model
