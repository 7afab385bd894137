"""What is asked of a forward and of the device it runs on: its FLOPs, whether it waits, when it is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


@contextmanager
def defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """New tensors are on `device`, of `dtype`, inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def count(work: Callable[[], Tensor]) -> float:
    """FLOPs of `work`; torch's counter does not know the fused attention on CPU."""
    formula = {_CPU_ATTENTION: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        work()
    return counter.get_total_flops()


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """A forward that makes the CPU wait for the GPU raises inside."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
