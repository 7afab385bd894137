"""The hot path never waits for the device: a run on a GPU that is not there, whose tensors have no values to read.

`FakeTensorMode` raises where a value would come back (`.item()`, `nonzero`, a boolean index) or devices would mix.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_dit import gaussian_router as dit_adapter
from test_dit_routers import embedding
from test_official import random_weights
from test_width import low_rank, wide_router
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from toy import BLOCKS, Scene, gaussian_router, schedule
from toy_dit import CONFIG, DiTScene, routers

from dydit_core.budget import Plan
from dydit_core.families.dit import DiTFamily
from dydit_core.models.dit import EPS, FLOW, DiT, _log_sigmas_on, eps_log_sigmas
from dydit_core.routers.alternate import AlternateRouter
from dydit_core.routers.change import ChangeRouter, ChangeState
from dydit_core.routers.official import OfficialRouter
from dydit_core.routers.quantiles import Quantiles
from dydit_core.routers.token import CapacityTable
from dydit_core.runtime import Branches, Method, Run
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing

# A torch for the CPU alone knows the device's name, but some random operations refuse it even without values.
pytestmark = pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="this torch is built without CUDA")

METHODS = {
    "change": Method(ChangeRouter(), Reuse()),
    "alternate": Method(AlternateRouter(), Reuse()),
    "token": Method(gaussian_router(), Nothing()),
    "all that is learned": Method(wide_router(tokens=True, added=low_rank()), Nothing()),
    "official": Method(OfficialRouter(lambda block: random_weights(32, spread=0.3), BLOCKS), Nothing()),
}
# What the official routers measure travels by itself; a device that is not there would send nothing.
ARRIVED = CapacityTable(torch.linspace(-1, 1, 9).expand(BLOCKS, 1, -1), torch.ones(1))


class Crossings(TorchDispatchMode):
    """Copies from one device to another."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].device != out.device:
            self.found.append(f"{args[0].device} to {out.device}")
        return out


def run_without_values(method: Method, rows: int, kind: type[Scene] = Scene) -> tuple[Run, list[str]]:
    """A run of four evaluations; copies between devices in all but the first."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device("cuda"):
        scene = kind(rows=rows, branches=Branches(("cfg",), slice(0, 1), slice(1, rows)))
    run, crossings = Run(Plan(0.6, branch_share=1.5), method, schedule(4)), []
    for sigma in schedule(4):
        run.arrive(sigma)
        with fake, torch.device("cuda"):
            entering = scene.embed(sigma)
        with scene.passing(run), fake, Crossings() as crossed:
            assert scene.blocks(*entering).device.type == "cuda"
        crossings.append(crossed.found)
    run.finish()
    return run, sum(crossings[1:], [])


# Which rows of a batch share a prompt is a value: the official routers read it once, when they fold.
@pytest.mark.parametrize("name, rows", [(name, rows) for name in METHODS for rows in (1, 2) if (name, rows) != ("official", 2)])
def test_no_forward_waits_for_the_device(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Quantiles, "_send", lambda self, block, measured: None)
    monkeypatch.setattr(Quantiles, "table", lambda self: ARRIVED)
    run, crossings = run_without_values(METHODS[name], rows)
    assert crossings == []
    assert run.ledger.achieved == pytest.approx(0.6, rel=0.02), "the budget needs no values either"


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("name", ["table", "measured", "learned"])
def test_no_forward_of_a_dit_waits_for_the_device(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Widths are decided before the forwards: the embedding of the schedule is read once, here it is made on the CPU."""
    monkeypatch.setattr(Quantiles, "_send", lambda self, block, measured: None)
    arrived = replace(ARRIVED, quantiles=ARRIVED.quantiles[:3])
    monkeypatch.setattr(Quantiles, "table", lambda self: arrived)
    monkeypatch.setattr(DiTFamily, "time_embedding", lambda self, model, backend, sigmas, dtype: embedding(sigmas, dtype))
    made = {"table": replace(routers(), table=arrived), "measured": routers(), "learned": dit_adapter(with_widths=True)}[name]
    run, crossings = run_without_values(Method(made, Reuse() if name == "measured" else Nothing()), rows, DiTScene)
    assert crossings == []
    assert run.ledger.achieved == pytest.approx(0.6, rel=0.02)


@pytest.mark.parametrize("prediction", [EPS, FLOW])
def test_a_whole_dit_copies_nothing_to_the_device(prediction: str) -> None:
    """The timestep is looked up where the model runs: of what is copied there, nothing is copied again."""
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake, torch.device("cuda"):
        model = DiT(replace(CONFIG, prediction=prediction))
        inputs = torch.randn(2, *model.config.latent_size), torch.full((2,), 0.5), torch.zeros(2, dtype=torch.long)
    eps_log_sigmas()  # kept for every later test, so not made without values
    crossings = []
    try:
        for _ in range(2):
            with fake, Crossings() as crossed:
                assert model.denoise_direction(*inputs).device.type == "cuda"
            crossings.append(crossed.found)
    finally:
        _log_sigmas_on.cache_clear()  # a tensor without values
    assert crossings == [["cpu to cuda:0"] if prediction == EPS else [], []]


def test_a_value_that_is_read_back_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = ChangeState.computed
    monkeypatch.setattr(ChangeState, "computed", lambda self, gate, kept: float(gate.normed.sum()) and computed(self, gate, kept))
    with pytest.raises(DataDependentOutputException):
        run_without_values(METHODS["change"], 1)


def test_a_copy_to_the_device_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    scores = ChangeState.scores
    monkeypatch.setattr(ChangeState, "scores", lambda self, gate: scores(self, gate) + torch.zeros(64).to(gate.normed.device))
    assert run_without_values(METHODS["change"], 1)[1]
