"""The three parts of an adapter file as tensors: token scores, width scores, TD-LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..routers.sketch import channels
from ..routers.token import CapacityTable, TokenScores
from ..routers.width import WidthScores
from ..td_lora import TimestepLoRA
from .fit import Layout

Shapes = Mapping[str, Sequence[int]]
GATES = ("softmax", "sigmoid", "none")
_FACTOR = re.compile(r"low_rank\.(\d{1,4})\.([a-z0-9_.]{1,40})\.(down|up)")


def tensors(scores: TokenScores | None, table: CapacityTable | None, width: WidthScores | None,
            low_rank: TimestepLoRA | None, layout: Layout) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and their sizes for the metadata."""
    found: dict[str, Tensor] = {}
    sizes: dict[str, str] = {}
    if scores is not None and table is not None:
        found |= {f"scores.{name}": value for name, value in scores.state_dict().items()}
        found |= {"table.quantiles": table.quantiles, "table.edges": table.edges}
        sizes["rank"] = str(scores.down.shape[1])
        if scores.stale is not None:
            sizes["sketch"] = str(channels(layout.width))
    if width is not None:
        found |= {"width.heads": width.heads, "width.groups": width.groups}
        sizes |= {"heads": str(width.heads.shape[-1]), "groups": str(width.groups.shape[-1])}
    if low_rank is not None:
        found["low_rank.mix"] = low_rank.mix
        for (block, layer), down, up in zip(low_rank.keys, low_rank.down, low_rank.up):
            found |= {f"low_rank.{block}.{layer}.down": down, f"low_rank.{block}.{layer}.up": up}
        hidden = next((up.shape[1] for (_, layer), up in zip(low_rank.keys, low_rank.up) if layer.endswith(("_mlp.0", "mlp.fc1"))), None)
        fused = next((up.shape[1] for (_, layer), up in zip(low_rank.keys, low_rank.up) if layer == "linear1"), 0)
        sizes |= {"experts": str(low_rank.mix.shape[-1]), "low_rank_gate": low_rank.gate,
                  "mlp": str(hidden or max(1, fused - 3 * layout.width))}
    return found, sizes


def expected(sizes: Mapping[str, int], shapes: Shapes) -> dict[str, list[list[int]]]:
    """The shapes that each tensor may have under these sizes; what sizes do not say is taken from `shapes`."""
    blocks, width = sizes["double"] + sizes["single"], sizes["width"]
    allowed: dict[str, list[list[int]]] = {}

    def free(key: str, axis: int) -> int:
        """A size that any file may choose."""
        shape = shapes.get(key) or [1]
        return shape[axis] if -len(shape) <= axis < len(shape) else 1

    if "rank" in sizes:
        rank, bins = sizes["rank"], free("table.edges", 0)
        allowed |= {
            "scores.weight": [[blocks, width]], "scores.bias": [[blocks]],
            **({"scores.text": [[blocks, width]]} if sizes["double"] else {}),
            "scores.down": [[blocks, rank, width]], "scores.up": [[blocks, width, rank]], "scores.slope": [[blocks, rank]],
            **({"scores.stale": [[blocks]]} if "sketch" in sizes else {}),
            "table.edges": [[bins]], "table.quantiles": [[blocks, bins, free("table.quantiles", -1)]],
        }
    if "groups" in sizes:
        knots = max(2, free("width.heads", 0))
        allowed |= {"width.heads": [[knots, blocks, sizes.get("heads", 0)]], "width.groups": [[knots, blocks, sizes["groups"]]]}
    if "experts" in sizes:
        allowed["low_rank.mix"] = [[max(2, free("low_rank.mix", 0)), blocks, sizes["experts"]]]
        for block, layer in sorted({(int(found[1]), found[2]) for key in shapes if (found := _FACTOR.fullmatch(key))}):
            if block < blocks and layer in (channels := _channels(block, sizes["double"], width, sizes.get("mlp", 0))):
                down, up = f"low_rank.{block}.{layer}.down", f"low_rank.{block}.{layer}.up"
                allowed |= _factors(down, up, free(down, 1), *channels[layer], sizes["experts"])
    return allowed


def _factors(down: str, up: str, rank: int, inputs: int, outputs: int, experts: int) -> dict[str, list[list[int]]]:
    return {down: [[count, rank, inputs] for count in (1, experts)], up: [[count, outputs, rank] for count in (experts, 1)]}


def _channels(block: int, double: int, width: int, hidden: int) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's layers; without `double` blocks it is a DiT's."""
    if not double:
        return {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), "mlp.fc1": (width, hidden), "mlp.fc2": (hidden, width)}
    if block >= double:
        return {"linear1": (width, 3 * width + hidden), "linear2": (width + hidden, width)}
    of = {"attn.qkv": (width, 3 * width), "attn.proj": (width, width), "mlp.0": (width, hidden), "mlp.2": (hidden, width)}
    return {f"{stream}_{name}": sizes for stream in ("img", "txt") for name, sizes in of.items()}


def build(found: Mapping[str, Tensor], layout: Layout, metadata: Mapping[str, str]) -> tuple:
    """Token scores, capacity table, width scores and TD-LoRA, frozen; None where the file has none."""
    scores = table = width = low_rank = None
    if "scores.down" in found:
        with torch.device("meta"):
            scores = TokenScores(layout.blocks, layout.width, found["scores.down"].shape[1], stale="scores.stale" in found,
                                 text="scores.text" in found)
        scores.load_state_dict(_under("scores.", found), assign=True)
        scores.requires_grad_(False)
        table = CapacityTable(found["table.quantiles"], found["table.edges"])
    if "width.heads" in found:
        width = WidthScores(found["width.heads"], found["width.groups"]).requires_grad_(False)
    if "low_rank.mix" in found:
        factors = {(int(match[1]), match[2]): (value, found[f"low_rank.{match[1]}.{match[2]}.up"])
                   for key, value in found.items() if (match := _FACTOR.fullmatch(key)) and match[3] == "down"}
        low_rank = TimestepLoRA(factors, found["low_rank.mix"], metadata["low_rank_gate"]).requires_grad_(False)
    return scores, table, width, low_rank


def _under(prefix: str, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
