"""The latents that a sampler node hands out at the end of a run, known again by their fingerprints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..dydit_core.trace import fingerprint


class HandedOut:
    """Of one run: the `result` of sampling, and the denoised latent that a custom sampler has as a second output."""

    def __init__(self) -> None:
        self.result: Tensor | None = None
        self._denoised: Tensor | None = None

    def listening(self, callback: Callable | None) -> Callable | None:
        """The sampler node's callback; what it is given last becomes the node's second output."""
        def listen(step: int, denoised: Tensor, *more: Any) -> Any:
            self._denoised = denoised
            return callback(step, denoised, *more)

        return listen if callback is not None else None

    def fingerprints(self, model: Any) -> tuple[str, ...]:
        """None where sampling did not come to its end. `model`: the host's, which knows the latent's scale."""
        if self.result is None:
            return ()
        found = [fingerprint(self.result)]
        if isinstance(self._denoised, Tensor):
            # On the CPU, where the node does it too: elsewhere the last bits differ.
            found.append(fingerprint(model.process_latent_out(self._denoised.cpu())))
        return tuple(found)
