"""What the quality tables compare: every method by its name, for the model it runs on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

from ..checkpoints.adapter import Adapter, load_adapter
from ..demo.files import adapter_file
from ..models.flux import Flux
from ..parts import Router
from ..routers.alternate import AlternateRouter
from ..routers.change import ChangeRouter
from ..routers.learned import LearnedRouter
from ..routers.random import RandomRouter
from ..routers.skip import SkipRouter
from ..runtime import Method
from ..substitutes.history import Reuse
from ..substitutes.nothing import Nothing
from .influence import least_first
from .magnitude import magnitude_widths

NOTHING, REUSE = "nothing", "reuse"
RANDOM, OPEN = f"random × {NOTHING}", "every gate open"
# The demo's adapters by the kind in their file names, and what a table calls them.
SHIPPED = {"sdt": "SDT", "sdt_tdw": "SDT+TDW", "sdt_tdw_tdlora": "SDT+TDW+TD-LoRA", "reuse": "SDT, made for reuse"}
_WITH_WIDTHS = "SDT+TDW"
# The one that is for the few-step twin.
SHIPPED_TWIN = {"twin": "SDT+TD-LoRA, made for it"}
# What needs neither training nor a look at the model.
_FREE: dict[tuple[str, str], Router] = {
    ("changed", REUSE): ChangeRouter(),
    ("alternate steps", REUSE): AlternateRouter(),
    ("random", REUSE): RandomRouter(),
    ("random", NOTHING): RandomRouter(),
}


@dataclass(frozen=True)
class Contender:
    """A method; `family`: those that share a line of the plot; `file`: the adapter that holds its gates."""

    method: Method
    family: str
    file: Path | None = None

    @property
    def trained(self) -> bool:
        return self.file is not None


def shipped(weights: Path, kinds: Mapping[str, str]) -> dict[str, Path]:
    """The files of the demo's adapters of these kinds, by the names of their rows."""
    return {name: weights / adapter_file(kind) for kind, name in kinds.items()}


def contenders(files: Mapping[str, Path], cuts: Mapping[tuple[str, str], Router] = MappingProxyType({})) -> dict[str, Contender]:
    """All methods by name: those of the adapters in `files`, those that any model takes, and `cuts` (see `flux_cuts`)."""
    return {**dict(_trained(files)), **dict(_untrained({**_FREE, **cuts}))}


def flux_cuts(model: Flux) -> dict[tuple[str, str], Router]:
    """What leaves whole parts of a FLUX out, by name and by what stands in."""
    return {("layer skip", NOTHING): SkipRouter(least_first(model)),
            ("width by magnitude", NOTHING): LearnedRouter(width=magnitude_widths(model))}


def method_of(adapter: Adapter, substitute: str) -> Method:
    """An adapter's gates with `substitute` in place of what they skip."""
    return Method(adapter.router.for_reuse(), Reuse()) if substitute == REUSE else Method(adapter.router, Nothing())


def _trained(files: Mapping[str, Path]) -> Iterator[tuple[str, Contender]]:
    adapters = {name: load_adapter(path) for name, path in files.items()}
    for name, adapter in adapters.items():
        if adapter.low_rank is not None:
            yield f"{name}, {OPEN}", Contender(Method(adapter.router.open, Nothing()), OPEN, files[name])
    gates = [(name, adapter, files[name]) for name, adapter in adapters.items()]
    if _WITH_WIDTHS in adapters:
        gates.insert(1, ("TDW", replace(adapters[_WITH_WIDTHS], scores=None, table=None), files[_WITH_WIDTHS]))
    for substitute in (NOTHING, REUSE):
        for name, adapter, path in gates:
            yield f"{name} × {substitute}", Contender(method_of(adapter, substitute), f"trained × {substitute}", path)


def _untrained(routers: Mapping[tuple[str, str], Router]) -> Iterator[tuple[str, Contender]]:
    for (name, substitute), router in routers.items():
        yield f"{name} × {substitute}", Contender(Method(router, Reuse() if substitute == REUSE else Nothing()), name)
