"""What a Latte's file has beyond a DiT's, and which of its relatives are refused: those that read prompts."""

from __future__ import annotations

from collections.abc import Iterable

from .files import bad
from .source import AGAIN, Source

# Positions in time, which no DiT has.
TIMES = "temp_embed"
# Lattes of prompts: Vchitect/Latte's with `extras: 78`, and Latte-1, in diffusers' layout.
_PROMPTED = ("text_embedding_projection.", "temporal_transformer_blocks.")


def seems_latte(keys: Iterable[str]) -> bool:
    return any(key == TIMES or key.startswith(_PROMPTED) for key in keys)


def check_latte(source: Source) -> None:
    """Raises FileError for what is no Latte that is run here."""
    prompted = next((key for key in source.entries if key.startswith(_PROMPTED)), None)
    if prompted is not None:
        raise bad(source.path, f"is a Latte that reads prompts ({prompted[:80]})",
                  "choose one of classes or an unconditional one; their authors call them ucf101, ffs, skytimelapse and taichi-hd")


def check_pairs(source: Source, blocks: int) -> None:
    """Raises FileError."""
    if blocks % 2:
        raise bad(source.path, f"has {blocks} blocks, where a Latte has a temporal one after each spatial one",
                  AGAIN)
