"""Adapters for Lattes: the train command from file to adapter, for classes and without; and what a Latte does not take."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dydit_core.budget import Plan
from dydit_core.checkpoints.adapter import load_adapter
from dydit_core.checkpoints.fit import layout_of
from dydit_core.models.dit import DiT, DiTConfig
from dydit_core.models.latte import Latte, LatteConfig
from dydit_core.runtime import Method
from dydit_core.sampling import eps_sigmas, sample
from dydit_core.standalone import Budgeted
from dydit_core.substitutes.history import Reuse
from dydit_core.train.preview import false_colours
from dydit_core.train.rollout import roll_out
from dydit_core.train.router import Recipe, new_router_run
from dydit_core.train.teacher import Teacher, dit_teacher
from dydit_core.train.trajectories import Trajectories, plan_runs, record
from test_class_adapters import FAST
from training import train

CONFIG = LatteConfig(hidden_size=32, depth=4, num_heads=4, side=8, frames=3, classes=3)
SIZE = (4, 3, 8, 8)


@cache
def random_latte(classes: int = 3) -> Latte:
    """Random weights everywhere: a fresh one would ignore its blocks, whose gates start at zero."""
    torch.manual_seed(0)
    model = Latte(replace(CONFIG, classes=classes))
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    return model.eval().requires_grad_(False)


def write(path: Path, classes: int = 3) -> Path:
    save_file({key: value.contiguous() for key, value in random_latte(classes).state_dict().items()}, path, {"heads": "4"})
    return path


def recorded(teacher: Teacher, cfg: float = 1.0) -> Trajectories:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(3, *SIZE, generator=generator)
    plan = plan_runs((torch.arange(3),), (torch.tensor([3]),), noise, teacher.schedule(4), generator, (cfg, cfg), jitter=0.0)
    record(teacher, plan)
    return plan


@pytest.mark.parametrize("cfg", [1.0, 2.0])
def test_a_recorded_run_is_a_sampling_run(cfg: float) -> None:
    teacher = dit_teacher(random_latte(), torch.float32)
    plan, schedule = recorded(teacher, cfg), teacher.schedule(4)
    assert schedule == eps_sigmas(4) and plan.x.shape == (3, 5, *SIZE) and teacher.tokens(plan.x) == 3 * 16
    noise = torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(1))
    drawn = sample(teacher.velocity, (torch.arange(3),), schedule[0] * noise, 4, cfg, (torch.tensor([3]),), schedule)
    assert (plan.x[:, -1].float() - drawn).abs().max() < 2e-2 * drawn.abs().max()


def test_open_gates_leave_the_dense_run() -> None:
    teacher = dit_teacher(random_latte(), torch.float32)
    plan = recorded(teacher)
    run = new_router_run(teacher, [plan], Recipe(steps=4, batch=8, counts=(4,), reuse=True, window=2), rank=4)
    assert run.gates.tokens.text is None
    window = plan.draw(4, 2, torch.Generator().manual_seed(0), start=1)
    outcome = roll_out(teacher, run.gates, window, 1e4, [None, None], reuse=True)
    assert outcome.drift.shape == (4, *SIZE)
    assert outcome.drift.abs().max() < 2e-3 * (window.x[:, -1] - window.x[:, 0]).abs().max()


@pytest.mark.parametrize("classes, flags", [(3, ("--kind", "tokens+widths+low-rank", "--cfg", "1", "3", "--grid-every", "1")), (0, ())], ids=["class", "free"])
def test_the_command_trains_an_adapter_that_meets_its_budget(tmp_path: Path, capsys: pytest.CaptureFixture, classes: int, flags: tuple[str, ...]) -> None:
    base = write(tmp_path / "base.safetensors", classes)
    train("--base", base, "--work", tmp_path / "work", *FAST, *flags)
    assert ("3 classes, 3 dense runs first" if classes else "1 model without classes, 3 dense runs first") in capsys.readouterr().out
    adapter, model, schedule = load_adapter(tmp_path / "work" / "adapter.safetensors"), random_latte(classes), eps_sigmas(6)
    assert adapter.facts.kind == "Latte/2" and adapter.fit.refusal(layout_of(model, 32)) is None and adapter.fit.warning(model) is None
    with torch.device("meta"):
        picture = DiT(DiTConfig(hidden_size=32, depth=4, num_heads=4, side=8))
    assert "made for a Latte/2 of width 32 with 4 blocks; this model is a DiT/2 of" in adapter.fit.refusal(layout_of(picture, 32))
    given = (torch.arange(3),) if classes else ()
    with Budgeted(model, Plan(0.8), Method(adapter.router, Reuse()), schedule) as budgeted:
        out = sample(budgeted, given, schedule[0] * torch.randn(3, *SIZE, generator=torch.Generator().manual_seed(2)), 6, schedule=schedule)
    assert out.isfinite().all() and budgeted.spent.achieved == pytest.approx(0.8, abs=0.03)
    if classes:
        assert {layer for _, layer in adapter.low_rank.keys} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
        (sheet, *_) = sorted((tmp_path / "work").glob("*.png"))
        assert Image.open(sheet).width > 200


def test_a_sheet_shows_four_frames() -> None:
    """Frames 0, 2, 3 and 5 of 6, in rows of two; each is what it is alone."""
    video = torch.arange(6.0)[None, None, :, None, None] + torch.randn(1, 4, 6, 2, 3, generator=torch.Generator().manual_seed(0))
    (picture,) = false_colours(video, video)
    assert picture.size == (8 * 6, 8 * 4)
    left, right = video[:, :, [0, 3]], video[:, :, [2, 5]]
    (whole,) = false_colours(torch.cat((torch.cat(left.unbind(2), 2), torch.cat(right.unbind(2), 2)), 3),
                             torch.cat((torch.cat(left.unbind(2), 2), torch.cat(right.unbind(2), 2)), 3))
    assert picture.tobytes() == whole.tobytes()


@pytest.mark.parametrize("classes, flags, said", [
    (3, ("--prompts", "a.txt"), "--prompts is for FLUX, and base.safetensors is a Latte-32×4/2, which takes --classes alone"),
    (3, ("--shift", "2"), "--shift is for flow matching"),
    (3, ("--dry-run",), "--dry-run is for FLUX alone; the first steps of a DiT, SiT or Latte say what they take"),
    (0, ("--classes", "1"), "--classes is for models of classes, and base.safetensors is an unconditional Latte-32×4/2; take it out"),
    (0, ("--cfg", "4"), "--cfg is for models of classes, and base.safetensors is an unconditional Latte-32×4/2; take it out"),
])
def test_what_a_latte_does_not_take_is_said(tmp_path: Path, classes: int, flags: tuple[str, ...], said: str) -> None:
    with pytest.raises(SystemExit, match=said):
        train("--base", write(tmp_path / "base.safetensors", classes), "--work", tmp_path / "work", *FAST, *flags)
