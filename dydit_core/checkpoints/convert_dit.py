"""A DiT, SiT, Latte or DyDiT as the one `.safetensors` that ComfyUI loads: its tensors as they are, and what they do not say as metadata.

    prediction   eps (DiT, Latte) or flow (SiT)
    heads        number of attention heads
    classes      JSON: names of the classes in order, or their number
    source       name of the file it was made of, and the key in it ("ema") that the weights were under
    modelspec.*  Stability AI ModelSpec 1.0.1
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from ..routers.token import CapacityTable
from .dit import DiTFile
from .dit_table import table_tensors
from .files import bad
from .outputs import Output
from .source import Entry, Source
from .stream import Plan

_LICENCE = "DiT's weights, and those fine-tuned from them (DyDiT), are CC BY-NC 4.0; SiT's are MIT; Latte's are Apache 2.0; for others ask who trained them"


def dit_output(found: DiTFile, out: Path) -> Output:
    """`out`: the file, or a folder. Raises FileError."""
    source = found.source
    target = out if out.suffix == ".safetensors" and not out.is_dir() else out / f"{source.path.stem}.safetensors"
    if target.resolve() == source.path.resolve():
        raise bad(source.path, "would be written over itself", "name another file")
    keys = [*found.table_keys, *found.keys, *found.router_keys]
    return Output(target, Plan(_entries(source, keys), metadata(found)), source.tensors(keys))


def calibrated_output(found: DiTFile, table: CapacityTable, out: Path) -> Output:
    """The file `out`: all that `found` holds, as it is, and `table`."""
    source, keys, added = found.source, [*found.keys, *found.router_keys], table_tensors(table)
    # The table first: the model may be in half precision, and numbers of four bytes lie where four bytes begin.
    entries = [*(Entry(key, "F32", tuple(value.shape)) for key, value in added.items()), *_entries(source, keys)]
    return Output(out, Plan(entries, source.metadata), chain(added.items(), source.tensors(keys)))


def _entries(source: Source, keys: Sequence[str]) -> list[Entry]:
    """By these keys, whatever stands before them in the file."""
    return [Entry(key, source.entries[key].dtype, source.entries[key].shape) for key in keys]


def metadata(found: DiTFile) -> dict[str, str]:
    """What the file says about itself, and what it said before."""
    source, config = found.source, found.config
    under = f", {source.under}" if source.under else ""
    return {
        "modelspec.license": _LICENCE,
        "source": f"{source.path.name}{under}",
        **source.metadata,
        "format": "pt",
        "prediction": config.prediction,
        "heads": str(config.num_heads),
        "classes": json.dumps(found.class_names or config.classes),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": found.title,
        "modelspec.title": source.metadata.get("modelspec.title", source.path.stem),
    }
