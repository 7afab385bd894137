"""Adapters for a DiT and a SiT: the train command from file to adapter, on the noise levels of each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dydit_core.budget import Plan
from dydit_core.checkpoints.adapter import load_adapter
from dydit_core.checkpoints.fit import Layout
from dydit_core.methods import SUBSTITUTES
from dydit_core.models.dit import EPS, FLOW, DiT, DiTConfig
from dydit_core.runtime import Method
from dydit_core.sampling import eps_sigmas, sample, sigmas
from dydit_core.standalone import Budgeted
from dydit_core.train.calibrate import calibrate
from dydit_core.train.rollout import roll_out
from dydit_core.train.router import Recipe, new_router_run, train_step
from dydit_core.train.teacher import Teacher, dit_teacher
from dydit_core.train.trajectories import Trajectories, plan_runs, record
from training import train

CONFIG = DiTConfig(hidden_size=32, depth=2, num_heads=4, side=8, classes=3)
FAST = ("--steps", "10", "--batch", "4", "--group", "2", "--runs", "3", "--sampling-steps", "3", "--save-every", "4", "--budgets", "0.6", "0.8",
        "--precision", "fp32", "--device", "cpu", "--window", "1")
KIND = {EPS: "tokens+widths+low-rank", FLOW: "tokens+low-rank"}


def random_dit(prediction: str) -> DiT:
    """Random weights everywhere: a fresh DiT would ignore its blocks, whose gates start at zero."""
    torch.manual_seed(0)
    model = DiT(DiTConfig(**{**CONFIG.__dict__, "prediction": prediction}))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False)


def write(path: Path, prediction: str) -> Path:
    facts = {"prediction": prediction, "heads": "4", "classes": json.dumps(["cat", "dog", "tree"])}
    save_file({key: value.contiguous() for key, value in random_dit(prediction).state_dict().items()}, path, facts)
    return path


def recorded(teacher: Teacher, cfg: tuple[float, float] = (1.0, 1.0)) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, 4, 8, 8, generator=generator)
    plan = plan_runs((torch.arange(3),), (torch.tensor([3]),), noise, teacher.schedule(4), generator, cfg, jitter=0.0)
    record(teacher, plan)
    return plan


@pytest.mark.parametrize("prediction", [EPS, FLOW])
@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_recorded_run_is_a_sampling_run(prediction: str, cfg: float) -> None:
    teacher = dit_teacher(random_dit(prediction), torch.float32)
    plan, schedule = recorded(teacher, (cfg, cfg)), teacher.schedule(4)
    assert schedule == (eps_sigmas(4) if prediction == EPS else sigmas(4))
    noise = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    drawn = sample(teacher.velocity, (torch.arange(3),), schedule[0] * noise, 4, cfg, (torch.tensor([3]),), schedule)
    assert (plan.x[:, -1].float() - drawn).abs().max() < 2e-2 * drawn.abs().max()
    assert plan.conditioning[0].tolist() == [[0], [1], [2]] if cfg == 1 else [[0, 3], [1, 3], [2, 3]]


def test_distances_compare_at_all_noise_levels() -> None:
    """DiT's noise grows to 157; as a mixture of picture and noise it ends at 1, as a SiT's."""
    eps, flow = (dit_teacher(random_dit(prediction), torch.float32) for prediction in (EPS, FLOW))
    sigma, picture, noise = torch.tensor([0.25, 1.0, 157.0]), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    level = eps.level(sigma)
    assert torch.allclose(level, torch.tensor([0.2, 0.5, 157 / 158])) and torch.equal(flow.level(sigma), sigma)
    mixture = torch.lerp(picture, noise, level[:, None, None, None])
    assert torch.allclose(eps.mixed(picture + sigma[:, None, None, None] * noise, sigma), mixture, atol=1e-5)
    assert torch.equal(flow.mixed(mixture, level), mixture)


@pytest.mark.parametrize("prediction", [EPS, FLOW])
def test_open_gates_leave_the_dense_run(prediction: str) -> None:
    teacher = dit_teacher(random_dit(prediction), torch.float32)
    plan = recorded(teacher)
    recipe = Recipe(steps=4, batch=8, counts=(4,), reuse=True, window=2)
    run = new_router_run(teacher, [plan], recipe, rank=4)
    assert run.gates.tokens.text is None
    window = plan.draw(4, 2, torch.Generator().manual_seed(0), start=1)
    outcome = roll_out(teacher, run.gates, window, 1e4, [None, None], reuse=True)
    scale = (window.x[:, -1] - window.x[:, 0]).abs().max()
    assert outcome.drift.abs().max() < 2e-3 * scale
    table = calibrate(teacher, run.gates, [plan], recipe, 0.0, samples=16)
    highest = float(plan.sigmas.max())
    assert table.edges[-1] == (highest if prediction == EPS else 1.0) and (table.edges.diff() > 0).all()
    assert table.edges[4] == pytest.approx(1.0 if prediction == EPS else 0.5)


@pytest.mark.parametrize("prediction", [EPS, FLOW])
def test_a_step_moves_the_gates(prediction: str) -> None:
    teacher = dit_teacher(random_dit(prediction), torch.float32)
    recipe = Recipe(steps=4, batch=8, counts=(4,), budgets=(0.6, 0.8))
    data, run = [recorded(teacher)], None
    run = new_router_run(teacher, data, recipe, rank=4)
    before = [param.clone() for param in run.params]
    losses = [train_step(run, teacher, data, recipe) for _ in range(2)]
    assert all(torch.isfinite(torch.tensor(losses))) and any(not torch.equal(a, b) for a, b in zip(before, run.params))
    assert (run.gauge[:, 1] < 20).all(), "in decibels; noise of 157 is not counted in full"


@pytest.fixture(scope="module", params=[EPS, FLOW])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp(request.param)
    train("--base", write(folder / "base.safetensors", request.param), "--work", folder / "work", "--kind", KIND[request.param], *FAST)
    return folder, request.param


def test_the_command_trains_an_adapter_that_meets_its_budget(trained: tuple[Path, str]) -> None:
    folder, prediction = trained
    adapter = load_adapter(folder / "work" / "adapter.safetensors")
    here, other = ("DiT/2", "SiT/2") if prediction == EPS else ("SiT/2", "DiT/2")
    assert adapter.fit.layout == Layout(32, 0, 2, here) and adapter.fit.refusal(Layout(32, 0, 2, here)) is None
    assert f"made for a {here} of width 32 with 2 blocks; this model is a {other} of" in adapter.fit.refusal(Layout(32, 0, 2, other))
    assert adapter.fit.warning(random_dit(prediction)) is None and adapter.misfit(4, 128) is None
    assert set(adapter.low_rank.keys) == {(block, layer) for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    assert (adapter.width is not None) == (prediction == EPS)
    assert "made for 128 MLP channels; this model has 64" in adapter.misfit(4, 64)
    model, schedule = random_dit(prediction), eps_sigmas(6) if prediction == EPS else sigmas(6)
    with Budgeted(model, Plan(0.8), Method(adapter.router, SUBSTITUTES["reuse"]), schedule) as budgeted:
        sample(budgeted, (torch.arange(3),), schedule[0] * torch.randn(3, 4, 8, 8), 6, schedule=schedule)
    assert budgeted.spent.achieved == pytest.approx(0.8, abs=0.03)


def test_killed_it_goes_on_as_if_it_had_not_been(trained: tuple[Path, str], tmp_path: Path) -> None:
    folder, prediction = trained
    flags = ("--base", folder / "base.safetensors", "--work", tmp_path, "--kind", KIND[prediction], *FAST)
    train(*flags, "--steps", "4")
    again = torch.load(tmp_path / "training.pt", weights_only=True)
    assert again["step"] == 4
    train(*flags)
    assert torch.load(tmp_path / "training.pt", weights_only=True)["step"] == 10


def test_classes_are_chosen_by_number_or_name(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    base = write(tmp_path / "base.safetensors", EPS)
    train("--base", base, "--work", tmp_path / "work", *FAST, "--steps", "1", "--classes", "tree", "0")
    assert "2 classes" in capsys.readouterr().out


@pytest.mark.parametrize("flags, said", [
    (("--classes", "cow"), "--classes has 'cow'; base.safetensors has classes 0 to 2; its names are cat, dog, tree"),
    (("--classes", "3"), "--classes has '3'"),
    (("--prompts", "a.txt"), "--prompts is for FLUX, and base.safetensors is a DiT-32×2/2, which takes --classes alone"),
    (("--shift", "2"), "--shift is for flow matching"),
    (("--dry-run",), "--dry-run is for FLUX alone"),
])
def test_what_a_dit_does_not_take_is_said(tmp_path: Path, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        train("--base", write(tmp_path / "base.safetensors", EPS), "--work", tmp_path / "work", *FAST, *flags)


def test_classes_are_not_for_the_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--classes is for a DiT, SiT or Latte"):
        train("--work", tmp_path, "--classes", "1", "--steps", "1")
