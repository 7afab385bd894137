"""Measurements that are kept in a file, by everything that decided them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..storage import write_atomically
from .judge import Measured


class Results:
    def __init__(self, file: Path) -> None:
        self._file = file
        kept = json.loads(file.read_text()) if file.exists() else []
        self._kept = {_text(one["key"]): one for one in kept}

    def get(self, key: Mapping[str, Any]) -> Measured | None:
        one = self._kept.get(_text(key))
        return Measured(**one["measured"]) if one else None

    def put(self, key: Mapping[str, Any], measured: Measured) -> None:
        """On disk when this returns."""
        self._kept[_text(key)] = {"key": key, "measured": asdict(measured)}
        text = "[\n" + ",\n".join(json.dumps(one) for one in self._kept.values()) + "\n]\n"
        write_atomically(self._file, lambda partial: partial.write_text(text))


def _text(key: Mapping[str, Any]) -> str:
    return json.dumps(key, sort_keys=True)
