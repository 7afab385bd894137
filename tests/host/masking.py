"""The reference that skipping is held to: the host's own dense model, masked.

Two hooks a block replace what the image MLP and the second linear layer give for the tokens that the run's Trace says
were not computed. So the picture and the Trace are held to each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from tiny import BLOCKS, budgeted, last_trace, sample, transformer  # first: starts the host

from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.trace import Trace
from torch import Tensor, nn


@contextmanager
def masked(model: ModelPatcher, trace: Trace, reuse: bool) -> Iterator[None]:
    """The dense model, in which tokens count as computed where `trace` says so; the rest reuses, or gives nothing."""
    rest = iter(torch.from_numpy(evaluation.mask()) for evaluation in trace.evaluations)
    now = {"mask": torch.empty(BLOCKS, 0, 0), "rows": slice(0, 0)}
    last: dict[tuple[int, int], Tensor] = {}

    def forward_begins(module: nn.Module, args: tuple) -> None:
        """The next batch rows of this evaluation, or the first of the next one."""
        start = now["rows"].stop
        if start == now["mask"].shape[1]:
            now["mask"], start = next(rest), 0
        now["rows"] = slice(start, start + args[0].shape[0])

    def replace(block: int, computed: Tensor) -> Tensor:
        kept = now["mask"][block, now["rows"], :, None]
        text = computed.shape[1] - kept.shape[1]
        kept = torch.cat((torch.ones(kept.shape[0], text, 1, dtype=torch.bool), kept), dim=1)
        stands_in = last.get((block, now["rows"].start)) if reuse else None
        out = torch.where(kept, computed, torch.zeros_like(computed) if stands_in is None else stands_in)
        last[block, now["rows"].start] = out
        return out

    net = transformer(model)
    sites: list[nn.Module] = [*(block.img_mlp for block in net.double_blocks), *(block.linear2 for block in net.single_blocks)]
    hooks = [net.register_forward_pre_hook(forward_begins)]
    hooks += [site.register_forward_hook(lambda module, args, out, block=block: replace(block, out)) for block, site in enumerate(sites)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check_against_masked(model: ModelPatcher, run: dict, reuse: bool, tolerance: float = 2e-4, **settings: object) -> Tensor:
    """The picture of a run under a budget, after it was found equal to the masked one."""
    found = sample(budgeted(model, 0.55, **settings), **run)
    trace = last_trace()
    assert trace.facts["state"] == "done" and trace.evaluations[-1].computed < 0.8
    with masked(model, trace, reuse):
        expected = sample(model, **run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance * float(expected.abs().max()))
    assert (found - sample(model, **run)).abs().max() > max(0.02, 2 * float((found - expected).abs().max()))  # the tokens that were skipped mattered
    return found
