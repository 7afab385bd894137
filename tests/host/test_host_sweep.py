"""DyDiT Sweep and its sheet: every budget is run once, timed alike, and laid side by side."""

from __future__ import annotations

import pytest
import torch
from tiny import as_node, budgeted, flux, sample  # first: starts the host

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from dydit_pack.dydit_core.trace import TraceStore
from dydit_pack.nodes import events, host, sweep
from dydit_pack.nodes.sheet import DyDiTSweepSheet
from dydit_pack.nodes.sweep import DyDiTSweep, parse


@pytest.fixture(autouse=True)
def store(monkeypatch: pytest.MonkeyPatch) -> TraceStore:
    kept = TraceStore()
    for module in (events, sweep, host):
        monkeypatch.setattr(module, "STORE", kept)
    return kept


def swept(budgets: str) -> tuple[list[ModelPatcher], list[torch.Tensor], list[torch.Tensor]]:
    """Models, latents and pictures (stand-ins for decoded ones) as the host's lists hand them on."""
    timed, each = as_node(DyDiTSweep).EXECUTE_NORMALIZED(model=flux(), budgets=budgets).result
    models = [budgeted(timed, budget) for budget in each]
    latents = [sample(model, 3, 2.0) for model in models]
    return models, latents, [(0.5 + 0.1 * latent[:, :3].movedim(1, -1)).repeat_interleave(8, 1).repeat_interleave(8, 2) for latent in latents]


def sheet(models: list, latents: list, pictures: list) -> tuple[torch.Tensor, torch.Tensor, str]:
    latents = [{"samples": latent} for latent in latents]
    return as_node(DyDiTSweepSheet).EXECUTE_NORMALIZED(image=pictures, model=models, latent=latents).result


@pytest.mark.parametrize("text, budgets", [("1.0, 0.75, 0.5", [0.5, 0.75, 1.0]), (" .5 1;0.5\n0.35 ", [0.35, 0.5, 1.0]), ("1", [1.0])])
def test_budgets_are_read(text: str, budgets: list[float]) -> None:
    assert parse(text) == budgets


@pytest.mark.parametrize("text", ["", "half", "0.1", "1.0, 50 %", "1.2", "nan"])
def test_what_is_no_budget_is_a_sentence(text: str) -> None:
    with pytest.raises(ValueError, match="DyDiT Sweep: budgets is .* write numbers from 0.2 to 1.0"):
        parse(text)


def test_more_runs_than_are_kept() -> None:
    with pytest.raises(ValueError, match="has 9 numbers, and the server keeps the last 8 runs; take some out"):
        parse(", ".join(str(0.2 + 0.1 * index) for index in range(9)))


def test_a_list_without_the_dense_picture_is_refused_before_anything_runs() -> None:
    with pytest.raises(ValueError, match='budgets is "0.75, 0.5" without 1.0, the dense picture that the others are held to; add it'):
        parse("0.75, 0.5")


def test_a_sweep() -> None:
    models, latents, pictures = swept("1.0, 0.8, 0.7")
    picture, chart, report = sheet(models, latents, pictures)
    dense, first, second, note = report.splitlines()
    assert dense.startswith("budget 100 %: dense, ") and dense.endswith(" s")
    assert first.startswith("budget 80 %, spent 80") and " dB to dense, " in first and " times as fast" in first
    assert second.startswith("budget 70 %, spent 7") and "held to the dense run on this machine" in note
    assert picture.ndim == chart.ndim == 4 and picture.shape[0] == 1 and chart.shape == (1, 480, 720, 3)
    worse, better = (float(line.split(": ")[1].split(" dB")[0]) for line in (second, first))
    assert worse < better < 100


def test_the_stopwatch_changes_nothing_and_leaves_nothing() -> None:
    (timed, *_), (latent, *_), _ = swept("1.0")
    assert torch.equal(latent, sample(flux(), 3, 2.0))
    assert timed.wrappers[WrappersMP.OUTER_SAMPLE].keys() == {sweep.KEY} and not timed.object_patches
    assert not timed.model_options["transformer_options"]


def test_a_dense_run_is_timed_from_its_first_evaluation(store: TraceStore) -> None:
    (timed, *_), (latent, *_), _ = swept("1.0")
    run = sweep.run_of(timed, latent)
    assert run is store.newest_first()[0] and run.facts["seconds_per_step"] > 0 and run.evaluations == ()
    assert sweep.run_of(flux(), latent) is None


def test_without_a_stopwatch_the_sheet_has_no_seconds_for_the_dense_run() -> None:
    models = [flux(), budgeted(flux(), 0.6)]
    latents = [sample(model, 2) for model in models]
    _, _, report = sheet(models, latents, [torch.rand(1, 32, 32, 3) for _ in models])
    dense, other, _ = report.splitlines()
    assert dense == "budget 100 %: dense" and other.endswith(" s")


def test_a_sweep_without_a_dense_run_is_refused() -> None:
    models = [budgeted(flux(), 0.6)]
    with pytest.raises(ValueError, match="DyDiT Sweep Sheet: no run of this sweep is dense; connect the budget output of DyDiT Sweep to the budget of DyDiT Budget"):
        sheet(models, [torch.zeros(1, 16, 16, 16)], [torch.rand(1, 32, 32, 3)])


def test_lists_of_different_sweeps_are_refused() -> None:
    with pytest.raises(ValueError, match="it got 2 pictures, 1 models and 1 latents; connect all three from the same sweep"):
        sheet([flux()], [torch.zeros(1, 16, 16, 16)], [torch.rand(1, 32, 32, 3)] * 2)
