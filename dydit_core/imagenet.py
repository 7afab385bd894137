"""Names of the classes that DiT, DyDiT and SiT were published for."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def imagenet() -> tuple[str, ...]:
    """The 1000 names, in the order of their numbers."""
    lines = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    return tuple(line for line in lines if not line.startswith("#"))
