"""How far a command is: percent done, on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Bar:
    """A line that is written over as long as it grows; `amount(total)` says what it is percent of. Called with (done, total)."""

    def __init__(self, amount: Callable[[int], str]) -> None:
        self._amount, self._shown = amount, -1

    def __call__(self, done: int, total: int) -> None:
        percent = 100 * done // total
        if percent != self._shown:
            self._shown = percent
            print(f"\r{percent:3} % of {self._amount(total)}", end="\n" if percent == 100 else "", file=sys.stderr, flush=True)
