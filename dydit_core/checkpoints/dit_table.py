"""The capacity table of a DyDiT's token routers, which `calibrate` adds to its file under the names of our adapters, in float32:

    table.quantiles [blocks, sigma bins, levels]   table.edges [sigma bins]   see `routers.token.CapacityTable`
"""

from __future__ import annotations

from torch import Tensor

from ..routers.token import CapacityTable
from .files import bad
from .source import Source

KEYS = QUANTILES, EDGES = "table.quantiles", "table.edges"
_AGAIN = "calibrate the file that it was made from again: python -m dydit_core calibrate FILE OUT.safetensors"


def check_table(source: Source, blocks: int) -> bool:
    """Whether `source` has a table, checked from the header. `blocks`: how many have routers. Raises FileError."""
    path, found = source.path, {key: source.entries[key] for key in KEYS if key in source.entries}
    if not found:
        return False
    if not blocks:
        raise bad(path, f"has a tensor {next(iter(found))}, which belongs to routers, and has none", _AGAIN)
    for key in KEYS:
        if key not in found:
            raise bad(path, f"lacks the tensor {key}", _AGAIN)
        if found[key].dtype != "F32":
            raise bad(path, f"has {key} in {found[key].dtype}, and the table of routers is float32 (F32)", _AGAIN)
    quantiles, edges = found[QUANTILES].shape, found[EDGES].shape
    if len(quantiles) != 3 or quantiles[0] != blocks or quantiles[1] < 1 or quantiles[2] < 2:
        raise bad(path, f"has {QUANTILES} of size {list(quantiles)} where [{blocks}, noise levels, 2 or more] are expected", _AGAIN)
    if edges != quantiles[1:2]:
        raise bad(path, f"has {EDGES} of size {list(edges)} where {QUANTILES} says {list(quantiles[1:2])}", _AGAIN)
    return True


def read_table(source: Source) -> CapacityTable:
    """The table that `check_table` found. Raises FileError."""
    tensors = {key: value.clone() for key, value in source.tensors(KEYS)}
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise bad(source.path, f"has numbers in {key} that are not finite (NaN or infinity)", _AGAIN)
    if (tensors[QUANTILES].diff(dim=-1) < 0).any():
        raise bad(source.path, f"has {QUANTILES} that do not rise from level to level", _AGAIN)
    if (tensors[EDGES].diff() <= 0).any():
        raise bad(source.path, f"has {EDGES} that do not rise", _AGAIN)
    return CapacityTable(tensors[QUANTILES], tensors[EDGES])


def table_tensors(table: CapacityTable) -> dict[str, Tensor]:
    """By name, as they are written."""
    return {QUANTILES: table.quantiles.float().contiguous(), EDGES: table.edges.float().contiguous()}
