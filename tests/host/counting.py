"""FLOPs that really happen inside the transformer blocks while the host samples."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` importable

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from comfy.ldm.modules import attention
from comfy.model_patcher import ModelPatcher
from dydit_pack.dydit_core.families.known import family_of
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Count:
    """`flops`: matrix products inside the blocks; `calls`: forwards of a block."""

    flops: int = 0
    calls: int = 0


@contextmanager
def block_flops(model: ModelPatcher) -> Iterator[Count]:
    """Count what the blocks of `model` compute, by whichever forward is in them at that moment.

    The counter sees no FLOPs in a fused attention on the CPU. The host takes its sub-quadratic one there, which is
    made of matrix products; should that change, the count would be silently short, so it is held fast here.
    """
    assert attention.optimized_attention is attention.attention_sub_quad, "the host has another attention on the CPU"
    count, opened = Count(), []
    with FlopCounterMode(display=False) as counter:
        def enter(*_: object) -> None:
            opened.append(counter.get_total_flops())

        def leave(*_: object) -> None:
            count.flops += counter.get_total_flops() - opened.pop()
            count.calls += 1

        network = model.model.diffusion_model
        hooks = [hook for block in family_of(network).blocks(network)
                 for hook in (block.register_forward_pre_hook(enter), block.register_forward_hook(leave))]
        try:
            yield count
        finally:
            for hook in hooks:
                hook.remove()
