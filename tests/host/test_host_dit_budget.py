"""DyDiT Budget on a DiT: the same contracts as on FLUX."""

from __future__ import annotations

import pytest
import torch
from tiny import budgeted, last_trace  # first: starts the host
from tiny_dit import CLASSES, DEPTH, SIDE, dit, sample

from dydit_pack.dydit_core.models.dit import EPS, FLOW

BOTH = pytest.mark.parametrize("prediction", [EPS, FLOW])
TOKENS = (SIDE // 2) ** 2


def test_budget_one_is_the_identity() -> None:
    assert budgeted(dit(), 1.0) is dit()


@BOTH
@pytest.mark.parametrize("method", ["changed tokens", "alternate steps"])
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_achieved_meets_asked(prediction: str, method: str, cfg: float) -> None:
    sample(budgeted(dit(prediction), 0.6, method=method), 20, cfg)
    trace = last_trace()
    assert abs(trace.facts["achieved"] - 0.6) < 0.02
    assert trace.evaluations[0].shape == (DEPTH, 2 if cfg > 1 else 1, TOKENS) and len(trace.evaluations) == 20
