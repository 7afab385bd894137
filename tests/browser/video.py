"""A tiny random Latte, a VAE for its frames, and a graph from them to a video file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from dydit_core.demo.vae import Decoder, Encoder, export_learned_vae
from dydit_core.models.latte import Latte, LatteConfig

LATTE = LatteConfig(hidden_size=64, depth=4, num_heads=4, side=16, frames=6, classes=10)
STEPS = 12


def write_models(folder: Path) -> None:
    """Into the host's `models` folder. As it is made, every gate of a Latte would be closed."""
    torch.manual_seed(5)
    model = Latte(LATTE).requires_grad_(False)
    for name, value in model.named_parameters():
        if name.endswith("embedding_table.weight"):
            value.normal_()
        elif "adaLN_modulation" in name:
            value.mul_(3)
    for kind in ("diffusion_models", "vae"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), folder / "diffusion_models" / "tiny_latte.safetensors", {"heads": str(LATTE.num_heads)})
    export_learned_vae(Encoder(LATTE.in_channels), Decoder(LATTE.in_channels), folder / "vae" / "tiny_vae.safetensors")


def workflow() -> dict[str, Any]:
    """From the checkpoint to frames in a preview and in a file."""
    graph = Graph()
    model, _ = graph.add("DyDiTCheckpointLoader", (0, 0), ["tiny_latte.safetensors", "first three (as the original)", False], outputs=["MODEL", "DYDIT_ADAPTER"])
    budget, = graph.add("DyDiTBudget", (360, 0), [0.6, "auto", "auto", 0, 1, 0.1, 1], {"model": model}, ["MODEL"])
    positive, = graph.add("DyDiTClassLabel", (770, 0), ["none (for negative)", 3], outputs=["CONDITIONING"])
    negative, = graph.add("DyDiTClassLabel", (770, 150), ["none (for negative)", -1], outputs=["CONDITIONING"])
    latent, = graph.add("DyDiTEmptyVideo", (770, 300), [1], {"model": budget}, ["LATENT"])
    sampled, = graph.add("KSampler", (770, 420), [1, "fixed", STEPS, 3, "euler", "simple", 1],
                         {"model": budget, "positive": positive, "negative": negative, "latent_image": latent}, ["LATENT"])
    frames, = graph.add("LatentCutToBatch", (1150, 0), ["t", 1], {"samples": sampled}, ["LATENT"])
    vae, = graph.add("VAELoader", (1150, 150), ["tiny_vae.safetensors"], outputs=["VAE"])
    pictures, = graph.add("VAEDecode", (1150, 250), [], {"samples": frames, "vae": vae}, ["IMAGE"])
    graph.add("PreviewImage", (1150, 350), [], {"images": pictures})
    video, = graph.add("CreateVideo", (1550, 0), [8], {"images": pictures}, ["VIDEO"])
    graph.add("SaveVideo", (1550, 150), ["dydit_latte", "auto", "auto"], {"video": video})
    return graph.saved()


class Graph:
    """A workflow file in the making. An output is (node, slot, type)."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, Any]] = []
        self.links: list[list[Any]] = []

    def add(self, kind: str, pos: tuple[int, int], widgets: list[Any], inputs: dict[str, tuple[int, int, str]] | None = None,
            outputs: list[str] | None = None) -> list[tuple[int, int, str]]:
        number, sockets = len(self.nodes) + 1, []
        for slot, (name, (source, output, socket)) in enumerate((inputs or {}).items()):
            self.links.append([len(self.links) + 1, source, output, number, slot, socket])
            sockets.append({"name": name, "type": socket, "link": len(self.links)})
            self.nodes[source - 1]["outputs"][output]["links"].append(len(self.links))
        made = [{"name": socket, "type": socket, "links": []} for socket in outputs or ()]
        self.nodes.append({"id": number, "type": kind, "pos": list(pos), "size": [330, 100], "flags": {}, "order": number, "mode": 0, "inputs": sockets,
                           "outputs": made, "properties": {"Node name for S&R": kind}, "widgets_values": widgets})
        return [(number, slot, socket) for slot, socket in enumerate(outputs or ())]

    def saved(self) -> dict[str, Any]:
        return {"last_node_id": len(self.nodes), "last_link_id": len(self.links), "nodes": self.nodes, "links": self.links, "extra": {}, "version": 0.4}
