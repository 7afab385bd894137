"""The nodes an artist sees. Importing this needs ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders, routes
from .adapter import DyDiTAdapterLoader
from .budget import DyDiTBudget
from .checkpoint import DyDiTCheckpointLoader
from .prompt import DyDiTScenePrompt


class DyDiTExtension(ComfyExtension):
    async def on_load(self) -> None:
        routes.add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DyDiTBudget, DyDiTAdapterLoader, DyDiTCheckpointLoader, DyDiTScenePrompt]


async def comfy_entrypoint() -> DyDiTExtension:
    # Before the node list: the loader's file list is read from these folders.
    folders.register()
    return DyDiTExtension()
