"""Which memory belongs to which batch rows: a branch keeps its history whatever it is batched with."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

from .parts import RouterState, SubstituteState

Keys = tuple[Hashable, ...]


@dataclass
class Stream:
    """Memory of the branches that run together, for one run. `seen`: blocks that have run, so have a history."""

    router: RouterState
    substitute: SubstituteState
    seen: set[int] = field(default_factory=set)

    def rows(self, part: slice) -> Stream:
        return Stream(self.router.rows(part), self.substitute.rows(part), set(self.seen))

    def reset(self) -> None:
        self.router.reset()
        self.substitute.reset()
        self.seen.clear()

    def joined(self, others: list[Stream]) -> Stream:
        return Stream(
            self.router.joined([other.router for other in others]),
            self.substitute.joined([other.substitute for other in others]),
            self.seen.intersection(*(other.seen for other in others)),
        )


class Streams:
    """The streams of one run. A host that is short of memory splits a batch, and joins it again, perhaps in another order.

    Each branch is in one stream at a time, so nothing is held twice and no history grows old unseen.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[Keys, int, int], Stream] = {}

    def of(self, keys: Keys, rows: int, image_tokens: int, start: Callable[[], Stream]) -> Stream:
        """The memory of the branches `keys`, each of `rows` batch rows, in this order; `start` makes an empty one."""
        home = keys, rows, image_tokens
        if home not in self._streams:
            first, *others = [self._take(key, rows, image_tokens) for key in keys]
            known = first is not None and None not in others
            self._streams[home] = first.joined(others) if known else start()
        return self._streams[home]

    def reset(self) -> None:
        """The picture is no longer what was seen of it; prompts and schedule are."""
        for stream in self._streams.values():
            stream.reset()

    def clear(self) -> None:
        self._streams.clear()

    def _take(self, key: Hashable, rows: int, image_tokens: int) -> Stream | None:
        """One branch's memory out of the stream it ran in so far, whose other branches then stand alone."""
        home = next((home for home in self._streams if key in home[0] and home[1:] == (rows, image_tokens)), None)
        if home is None:
            return None
        stream = self._streams.pop(home)
        for index, other in enumerate(home[0]):
            self._streams[(other,), rows, image_tokens] = stream.rows(slice(index * rows, (index + 1) * rows))
        return self._streams.pop(((key,), rows, image_tokens))
