"""DyDiT Checkpoint Loader: a FLUX, DiT, SiT or Latte and its routers from one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..dydit_core.checkpoints.dit import DiTFile, find_dit
from ..dydit_core.checkpoints.dit_adapter import dit_adapter
from ..dydit_core.checkpoints.dit_keys import seems_dit
from ..dydit_core.checkpoints.files import is_pickle
from ..dydit_core.checkpoints.fit import sketch
from ..dydit_core.checkpoints.flux_keys import ROUTER
from ..dydit_core.checkpoints.routers import find
from ..dydit_core.checkpoints.source import Source, open_source
from ..dydit_core.models.latte import Latte
from .dit import dit_model
from .guidance import guide_three
from .schema import AdapterType, lenient, schema

NODE, _FOLDER = "DyDiT Checkpoint Loader", "diffusion_models"
_THREE, _ALL = "first three (as the original)", "all"


class DyDiTCheckpointLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTCheckpointLoader",
            display_name=NODE,
            description="Load a model and its routers from one file: DiT, DyDiT and SiT, which draw classes, Latte, which draws videos, and FLUX with token routers (DyFLUX).",
            search_aliases=["dyflux", "dynamic flux", "load dydit", "load dit", "load sit", "load latte", "class conditional", "video model"],
            inputs=[
                lenient(io.Combo.Input, "checkpoint_name", options=folder_paths.get_filename_list(_FOLDER),
                        tooltip="A .safetensors file in models/diffusion_models: a DiT, DyDiT, SiT or Latte, or a FLUX with its token routers in it. Where a FLUX "
                                "and its routers are two files, as convert writes them, use Load Diffusion Model and DyDiT Adapter Loader. "
                                "Example: dydit_demo_sit.safetensors, which ships with the pack."),
                lenient(io.Combo.Input, "guidance_channels", options=[_THREE, _ALL], default=_THREE, optional=True, advanced=True,
                        tooltip="For DiT files, where cfg is above 1: the latent channels that it works on. first three is what their authors draw with; "
                                "all lets other nodes set how cfg is computed. A Latte always has all. Example: all, before RescaleCFG."),
                lenient(io.Boolean.Input, "interpolate_positions", default=False, optional=True, advanced=True,
                        tooltip="For DiT files: draw in other sizes than the one they were made for, with positions in between; the further from it, the worse. "
                                "Off: another size is refused. Example: on, for 320 × 256 pixels from a model for 256 × 256."),
            ],
            outputs=[io.Model.Output("model", display_name="model", tooltip="The model, for DyDiT Budget and a KSampler; a DiT takes its class from DyDiT Class Label, a Latte its latent from DyDiT Empty Video."),
                     AdapterType.Output("adapter", display_name="adapter", tooltip="Its routers, for the adapter input of DyDiT Budget; nothing for a plain DiT, SiT or Latte, "
                                        "which has none.")],
        )

    @classmethod
    def execute(cls, checkpoint_name: str, guidance_channels: str = _THREE, interpolate_positions: bool = False) -> io.NodeOutput:
        path = folder_paths.get_full_path(_FOLDER, checkpoint_name)
        if path is None:
            raise ValueError(f"{NODE}: {checkpoint_name} is not in models/diffusion_models; put the file there and press R.")
        if is_pickle(Path(path)):
            raise ValueError(
                f"{NODE}: {checkpoint_name} is a PyTorch file; run python -m dydit_core convert {path} OUT in the folder of this pack. "
                "It makes one file of a DiT, for this node, and two of a FLUX, for Load Diffusion Model and DyDiT Adapter Loader."
            )
        source = open_source(Path(path))
        if seems_dit(source.entries):
            file = find_dit(source)
            model = _dit_of(file, interpolate_positions)
            transformer = model.get_model_object("diffusion_model")
            adapter = dit_adapter(file, checkpoint_name, sketch(transformer))
            three = guidance_channels == _THREE and not isinstance(transformer, Latte)  # whose authors guide all four
            return io.NodeOutput(guide_three(model) if three else model, adapter)
        routers = find(source, title=checkpoint_name)
        model = load_base(path)
        return io.NodeOutput(model, routers.with_base(sketch(model.get_model_object("diffusion_model"))))

    @classmethod
    def fingerprint_inputs(cls, checkpoint_name: str, guidance_channels: str = _THREE, interpolate_positions: bool = False) -> float:
        """A file that was replaced is read again."""
        path = folder_paths.get_full_path(_FOLDER, checkpoint_name)
        return 0.0 if path is None else os.path.getmtime(path)


def load_base(path: str, disable_dynamic: bool = False) -> Any:
    """The FLUX in `path`, as the host's own loader gives it, without the routers, which it does not know."""
    source = open_source(Path(path))
    tensors, metadata = _read(source, [key for key in source.entries if f".{ROUTER}." not in key])
    model = comfy.sd.load_diffusion_model_state_dict(tensors, metadata=metadata, disable_dynamic=disable_dynamic)
    if model is None:
        raise ValueError(f"{NODE}: {os.path.basename(path)} holds no FLUX that ComfyUI knows; update ComfyUI, or choose another file.")
    model.cached_patcher_init = (load_base, (path,))  # the host loads it again where it wants a copy of its own
    return model


def load_dit(path: str, interpolate: bool, disable_dynamic: bool = False) -> Any:
    """The DiT, SiT or Latte in `path` as a MODEL, without the routers."""
    return _dit_of(find_dit(open_source(Path(path))), interpolate, disable_dynamic)


def _dit_of(file: DiTFile, interpolate: bool, disable_dynamic: bool = False) -> Any:
    tensors, _ = _read(file.source, file.keys)
    model = dit_model(file.config, tensors, file.class_names, interpolate, disable_dynamic)
    model.cached_patcher_init = (load_dit, (str(file.source.path), interpolate))
    return model


def _read(source: Source, keys: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """The tensors `keys` and the metadata, as the host reads files."""
    tensors, metadata = comfy.utils.load_torch_file(str(source.path), return_metadata=True)
    return {key: tensors[source.entries[key].name] for key in keys}, metadata
