"""DyDiT Save Adapter: what was trained, as a file that DyDiT Adapter Loader lists."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
from comfy.cli_args import args
from comfy_api.latest import io, ui

from ..dydit_core.checkpoints.adapter import Adapter, save_adapter
from ..dydit_core.storage import write_atomically
from .folders import ADAPTERS
from .schema import AdapterType, lenient, schema

NODE = "DyDiT Save Adapter"


class DyDiTSaveAdapter(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTSaveAdapter",
            display_name=NODE,
            description="Save a trained adapter in models/dydit, where DyDiT Adapter Loader finds it. Nothing is overwritten.",
            search_aliases=["export adapter", "save router"],
            inputs=[
                AdapterType.Input("adapter", tooltip="What DyDiT Train made."),
                io.String.Input("filename_prefix", default="adapter", tooltip="Name of the file in models/dydit; a number is added, and it may begin with a folder. "
                                "Example: flux/portraits gives flux/portraits_00001_.safetensors."),
                lenient(io.String.Input, "title", default="", tooltip="What the adapter is called in its file and on DyDiT Budget; empty keeps the name of the "
                                "training. Example: FLUX.1 dev, portraits.", advanced=True),
                lenient(io.String.Input, "description", default="", multiline=True, tooltip="What others should know of it, kept in the file; empty keeps what the training "
                                "wrote. Example: trained on 200 portrait prompts.", advanced=True),
                lenient(io.String.Input, "license", default="", tooltip="Under which terms others may use it, kept in the file. Example: apache-2.0.", advanced=True),
            ],
            outputs=[io.String.Output("file", display_name="file", tooltip="The name of the file, as DyDiT Adapter Loader lists it.")],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, adapter: Any, filename_prefix: str, title: str = "", description: str = "", license: str = "") -> io.NodeOutput:
        if not isinstance(adapter, Adapter):
            raise ValueError(f"{NODE}: adapter holds no gates of DyDiT Train (those of a released file are a file already); connect what DyDiT Train made.")
        words = {"title": title.strip(), "description": description.strip(), "license": license.strip()}
        adapter = replace(adapter, facts=replace(adapter.facts, **{key: word for key, word in words.items() if word}))
        root = folder_paths.get_folder_paths(ADAPTERS)[0]
        path = free_path(NODE, root, filename_prefix, "filename_prefix")
        write(NODE, path, lambda partial: save_adapter(partial, adapter, _workflow(cls.hidden)))
        name = os.path.relpath(path, root)
        return io.NodeOutput(name, ui=ui.PreviewText(f"models/dydit/{Path(name).as_posix()}"))


def _workflow(hidden: Any) -> dict[str, str]:
    """The graph that made a file, as the host's own nodes keep it."""
    if args.disable_metadata:
        return {}
    return {key: json.dumps(value) for key, value in {"prompt": hidden.prompt, **(hidden.extra_pnginfo or {})}.items() if value is not None}


def free_path(node: str, root: str, prefix: str, socket: str) -> Path:
    """The first path in `root` that begins with `prefix` and is not taken."""
    plain = os.path.normpath(prefix.strip())
    if not prefix.strip() or plain.startswith("..") or os.path.isabs(plain):
        raise ValueError(f'{node}: {socket} is "{prefix[:60]}"; write a name, with a folder before it if you like, for example flux/portraits.')
    folder, name, counter, *_ = folder_paths.get_save_image_path(plain, root)
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def write(node: str, path: Path, fill: Any) -> None:
    """Whole or not at all; a disk that is full is a sentence."""
    try:
        write_atomically(path, fill)
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise ValueError(f"{node}: {path} cannot be written ({reason}); free some space, or choose a folder that you may write to.") from error
