"""The routers of a released DyDiT as an adapter: with the model that they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from ..routers.dit import DiTRouters
from .dit import DiTFile
from .fit import Fit, Layout, Sketch


@dataclass(frozen=True, eq=False)
class DiTAdapter:
    router: DiTRouters
    fit: Fit

    def misfit(self, heads: int, mlp: int) -> str | None:
        """Why the routers do not fit blocks of `heads` and `mlp` MLP channels, or None."""
        made, groups = self.router.head_count, self.router.group_count
        if made != heads:
            return f'the routers of "{self.fit.title}" decide {made} attention heads; this model has {heads}'
        if mlp % groups:
            return f'the routers of "{self.fit.title}" decide {groups} channel groups, into which {mlp} MLP channels do not part'
        return None


def dit_adapter(file: DiTFile, title: str, base: Sketch) -> DiTAdapter | None:
    """The adapter in `file`, or None where it has no routers; `base`: sketch of the model beside them. Raises FileError."""
    router = file.read_routers()
    if router is None:
        return None
    config = file.config
    return DiTAdapter(router, Fit(title, Layout(config.hidden_size, 0, config.depth, config.kind), base))
