"""The nodes an artist sees. Importing this needs ComfyUI."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from . import folders, routes
from .adapter import DyDiTAdapterLoader
from .budget import DyDiTBudget
from .checkpoint import DyDiTCheckpointLoader
from .compare import DyDiTCompare
from .heatmap import DyDiTHeatmap
from .label import DyDiTClassLabel
from .prompt import DyDiTScenePrompt
from .prompts import DyDiTPrompts
from .save import DyDiTSaveAdapter
from .save_examples import DyDiTSaveExamples
from .sheet import DyDiTSweepSheet
from .sweep import DyDiTSweep
from .train import DyDiTTrain
from .video import DyDiTEmptyVideo


class DyDiTExtension(ComfyExtension):
    async def on_load(self) -> None:
        routes.add_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [DyDiTBudget, DyDiTAdapterLoader, DyDiTCheckpointLoader, DyDiTHeatmap, DyDiTCompare, DyDiTSweep, DyDiTSweepSheet,
                DyDiTClassLabel, DyDiTEmptyVideo, DyDiTScenePrompt, DyDiTPrompts, DyDiTTrain, DyDiTSaveAdapter, DyDiTSaveExamples]


async def comfy_entrypoint() -> DyDiTExtension:
    # Before the node list: the loader's file list is read from these folders.
    folders.register()
    return DyDiTExtension()
