"""The reference that skipping is held to: the host's own dense model, masked.

Hooks replace what the image MLP and the second linear layer of a block give for the tokens that the run's Trace says
were not computed. Where an adapter has widths and low-rank additions, further hooks multiply the heads and channel
groups that were off by zero, and add to each layer. So the picture, the Trace and the widths are held to each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from unittest.mock import patch

import torch
from tiny import BLOCKS, blocks, budgeted, last_trace, sample, transformer  # first: starts the host

from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.families.flux import FluxFamily
from dydit_pack.dydit_core.parts import LowRank, Width
from dydit_pack.dydit_core.runtime import ForwardPass
from dydit_pack.dydit_core.trace import Trace
from torch import Tensor, nn


@dataclass(frozen=True)
class Forward:
    """What one forward under a budget computed: its tokens [blocks, rows, tokens], a width for each block, and what it added."""

    sigma: float
    mask: Tensor
    widths: Sequence[Width]
    added: Callable[[int, str, Tensor], LowRank | None] | None


@contextmanager
def watched() -> Iterator[list[Forward]]:
    """The forwards under a budget, in order, but for those that another node put its cache in the place of."""
    seen: list[Forward] = []
    original = ForwardPass.close

    def close(self: ForwardPass) -> None:
        original(self)
        if self.executed:
            seen.append(Forward(self.sigma, self._mask, [self.width(block) for block in range(BLOCKS)], self._mixed))

    with patch.object(ForwardPass, "close", close):
        yield seen


class _Replay:
    """Which forward of the run the dense model is in."""

    def __init__(self, trace: Trace | None, forwards: Sequence[Forward]) -> None:
        self._masks = None if trace is None else iter(torch.from_numpy(evaluation.mask()) for evaluation in trace.evaluations)
        self._forwards = iter(forwards)
        self._options: dict = {}
        self._done: tuple[float, set] = (-1.0, set())
        self.mask, self.rows = torch.empty(BLOCKS, 0, 0), slice(0, 0)
        self.now: Forward | None = None
        self.branch: object = None
        self.extra = False

    def called(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._options = kwargs["transformer_options"]

    def begins(self, module: nn.Module, args: tuple) -> None:
        """The model really runs: on the next batch rows of this evaluation, or the first of the next one.

        Prompts that have run at this noise level already run for guidance of another kind, which is dense.
        """
        sigma, prompts = float(self._options["sigmas"][0]), set(self._options["uuids"])
        done = self._done[1] if self._done[0] == sigma else set()
        self.extra, self._done = prompts <= done, (sigma, done | prompts)
        if self.extra:
            return
        self.now, start = next(self._forwards, None), self.rows.stop
        if self._masks is None:
            self.mask, start = self.now.mask, 0
        elif start == self.mask.shape[1]:
            self.mask, start = next(self._masks), 0
        self.rows = slice(start, start + args[0].shape[0])
        self.branch = start if self._masks is not None else tuple(self._options["uuids"])


@contextmanager
def masked(model: ModelPatcher, trace: Trace | None, reuse: bool, forwards: Sequence[Forward] = ()) -> Iterator[None]:
    """The dense model, in which tokens count as computed where `trace` says so; the rest reuses, or gives nothing.

    Where passes differ in size the Trace does not have them all, and `forwards` say it.
    """
    replay, last = _Replay(trace, forwards), {}

    def replace(block: int, module: nn.Module, args: tuple, computed: Tensor) -> Tensor:
        if replay.extra:
            return computed
        kept = replay.mask[block, replay.rows, :, None]
        text = computed.shape[1] - kept.shape[1]
        kept = torch.cat((torch.ones(kept.shape[0], text, 1, dtype=torch.bool), kept), dim=1)
        stands_in = last.get((block, replay.branch)) if reuse else None
        out = torch.where(kept, computed, torch.zeros_like(computed) if stands_in is None else stands_in)
        last[block, replay.branch] = out
        return out

    net = transformer(model)
    sites = [*(block.img_mlp for block in net.double_blocks), *(block.linear2 for block in net.single_blocks)]
    hooks = [net.register_forward_pre_hook(replay.called, with_kwargs=True), net.img_in.register_forward_pre_hook(replay.begins)]
    hooks += [hook for index, block in enumerate(blocks(model)) for hook in _narrowed(block, index, replay)] if forwards else []
    hooks += [site.register_forward_hook(partial(replace, block)) for block, site in enumerate(sites)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _narrowed(block: nn.Module, index: int, replay: _Replay) -> Iterator[torch.utils.hooks.RemovableHandle]:
    """A block at the width of the run, with its additions."""
    def multiply(units: tuple[str, ...], module: nn.Module, args: tuple) -> tuple[Tensor] | None:
        if replay.extra or replay.now is None:
            return None
        width, mask = replay.now.widths[index], []
        for unit in units:
            kept, count = (width.heads, width.head_count) if unit == "heads" else (width.groups, width.group_count)
            size = module.in_features if len(units) == 1 else block.hidden_size if unit == "heads" else module.in_features - block.hidden_size
            on = torch.zeros(count or 1)
            on[kept if kept is not None else slice(None)] = 1
            mask.append(on.repeat_interleave(size // len(on)))
        return (args[0] * torch.cat(mask).to(args[0]),)

    def add(name: str, module: nn.Module, args: tuple, out: Tensor) -> Tensor:
        if replay.extra or replay.now is None or replay.now.added is None:
            return out
        low = replay.now.added(index, name, args[0])
        return out if low is None else out + args[0] @ low.down.mT @ low.up.mT

    readers = {"linear2": ("heads", "groups")} if hasattr(block, "linear2") else {
        "img_attn.proj": ("heads",), "txt_attn.proj": ("heads",), "img_mlp.2": ("groups",)}
    for name, units in readers.items():
        yield block.get_submodule(name).register_forward_pre_hook(partial(multiply, units))
    for name, layer in FluxFamily().layers(block).items():
        yield layer.register_forward_hook(partial(add, name))


def check_against_masked(model: ModelPatcher, run: dict, reuse: bool, tolerance: float = 2e-4, traced: bool = True, **settings: object) -> Tensor:
    """The picture of a run under a budget, after it was found equal to the masked one; `traced`: its Trace has every pass."""
    with watched() as forwards:
        found = sample(budgeted(model, 0.55, **settings), **run)
    trace = last_trace()
    assert trace.facts["state"] == "done" and trace.facts["achieved"] < 0.8
    assert min(evaluation.computed for evaluation in trace.evaluations) < 0.8
    with masked(model, trace if traced else None, reuse, forwards):
        expected = sample(model, **run)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=tolerance * float(expected.abs().max()))
    assert (found - sample(model, **run)).abs().max() > max(0.02, 2 * float((found - expected).abs().max()))  # the tokens that were skipped mattered
    return found
