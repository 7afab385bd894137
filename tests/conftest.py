"""Being here puts this folder on the import path, so that tests in any sub-folder can ``import hosting``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def torch_as_it_was() -> Iterator[None]:
    """Our commands choose how attention is computed for their whole process; the next file's tests compare numbers to the last bit."""
    import torch

    backends = torch.backends.cuda
    flash, half = backends.flash_sdp_enabled(), backends.fp16_bf16_reduction_math_sdp_allowed()
    yield
    backends.enable_flash_sdp(flash)
    backends.allow_fp16_bf16_reduction_math_sdp(half)
