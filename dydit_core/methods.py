"""The one table of methods: router × substitute, what each needs, and which one `auto` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .routers.alternate import AlternateRouter
from .routers.change import ChangeRouter
from .parts import Router, Trained
from .runtime import Method
from .substitutes.history import Reuse
from .substitutes.nothing import Nothing

AUTO = "auto"
LEARNED, CHECKPOINT, CHANGED, ALTERNATE = "learned tokens", "checkpoint", "changed tokens", "alternate steps"
# Of ours the best, or level with it, at every step count and budget of docs/quality.md, with and without an adapter.
BEST_MEASURED = CHANGED


@dataclass(frozen=True)
class Entry:
    """`why` is one sentence for the artist; `substitutes` that make sense with it, its best first.

    `router(trained, substitute)` is None where `needs` is not met.
    """

    why: str
    substitutes: tuple[str, ...]
    router: Callable[[Trained | None, str], Router | None]
    needs: str = ""


SUBSTITUTES = {"reuse": Reuse(), "nothing": Nothing()}
METHODS = {
    LEARNED: Entry("Trained gates choose the tokens and, where the adapter has them, heads and channels; needs an adapter.", ("reuse", "nothing"),
                   lambda router, substitute: router.for_reuse() if router and substitute == "reuse" else router,
                   "a trained router; connect a DyDiT Adapter Loader, or the adapter output of the DyDiT Checkpoint Loader"),
    CHECKPOINT: Entry("The file's own threshold decides, as in the DyDiT authors' code; the slider is ignored.", ("nothing",),
                      lambda router, substitute: router and router.by_threshold(),
                      "the routers of a released DyDiT file; connect a DyDiT Checkpoint Loader"),
    CHANGED: Entry("Tokens that changed most since they were last computed; needs no training.", ("reuse",),
                   lambda router, substitute: ChangeRouter()),
    ALTERNATE: Entry("All tokens at some steps, none at others; needs no training.", ("reuse",),
                     lambda router, substitute: AlternateRouter()),
}


def resolve(method: str, substitute: str, router: Trained | None) -> tuple[str, str, Method]:
    """Names of the router and substitute that will run, and the method they make.

    `router` is the adapter's, or None without an adapter. Raises ValueError with one sentence where it cannot be.
    """
    name = _auto(router, substitute) if method == AUTO else method
    entry = METHODS[name]
    stand_in = _best(entry, router) if substitute == AUTO else substitute
    chosen = entry.router(router, stand_in)
    if chosen is None:
        raise ValueError(f'DyDiT Budget: "{name}" needs {entry.needs}, or choose "{CHANGED}".')
    if stand_in not in entry.substitutes and stand_in == "reuse":
        raise ValueError(f'DyDiT Budget: "{name}" is the released model as it is, with nothing in place of a token; set substitute to "nothing".')
    if stand_in not in entry.substitutes:
        raise ValueError(
            f'DyDiT Budget: "nothing" in place of a token needs gates that were trained for it, and "{name}" has none; set substitute to '
            f'"{entry.substitutes[0]}", or method to "{LEARNED}" with an adapter.'
        )
    return name, stand_in, Method(chosen, SUBSTITUTES[stand_in])


def _auto(router: Trained | None, substitute: str) -> str:
    """Only a learned router was made to put nothing in place of a token; a released model was trained with its own router, and
    gates that were trained for reuse are better at it than what needs no training."""
    if router is not None and (router.released or substitute == "nothing"):
        return LEARNED
    return LEARNED if router is not None and router.trained_for == "reuse" else BEST_MEASURED


def _best(entry: Entry, router: Trained | None) -> str:
    """A released model was trained, all of it, with nothing in place of a token; what reuse does to it is not measured."""
    return "nothing" if router is not None and router.released and "nothing" in entry.substitutes else entry.substitutes[0]


def as_trained(router: Trained) -> Method:
    """The router with what stood in for a skipped token when it was trained."""
    return Method(router, SUBSTITUTES[router.trained_for])
