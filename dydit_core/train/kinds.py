"""What an adapter can have, by the names that the shell and the node give it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_WIDTHS, _LOW_RANK = {"groups": 16}, {"experts": 2}


@dataclass(frozen=True)
class Kind:
    """`words` for its file; `parts`: what of a `router.Recipe` makes it."""

    words: str
    parts: Mapping[str, Any]

    @property
    def adds(self) -> bool:
        """Low-rank additions, which a budget of 1 has to hold to the base."""
        return "experts" in self.parts


KINDS = {
    "tokens": Kind("tokens (SDT)", {}),
    "tokens+low-rank": Kind("tokens and low-rank additions (SDT, TD-LoRA)", _LOW_RANK),
    "tokens+widths": Kind("tokens and widths (SDT, TDW)", _WIDTHS),
    "tokens+widths+low-rank": Kind("tokens, widths and low-rank additions (SDT, TDW, TD-LoRA)", {**_WIDTHS, **_LOW_RANK}),
}
