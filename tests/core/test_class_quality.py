"""The quality tables of the class-conditional demo models, on random ones of their shape."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosting import require_import

from dydit_core.__main__ import build_parser
from dydit_core.bench import judge
from dydit_core.bench.class_lab import OWN, ClassLab
from dydit_core.bench.judge import Judge, PictureJudge
from dydit_core.bench.lab import CLASSES, Settings, Shot
from dydit_core.bench.lineup import FEWER, class_lineup
from dydit_core.demo import dit
from dydit_core.demo.autoencoder import Autoencoder
from dydit_core.demo.class_model import export
from dydit_core.demo.classes import NAMES
from dydit_core.demo.files import CHECKER_FILE, CLASS_VAE_FILE, WEIGHTS, class_file
from dydit_core.demo.vae import export_learned_vae
from dydit_core.train.base import new_run, save

require_import("torchmetrics")
PICTURES = 15


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "REAL_SCENES", 16)
        patch.setattr(dit, "CONFIGS", {name: replace(config, hidden_size=32, depth=2, num_heads=4) for name, config in dit.CONFIGS.items()})
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, small: None) -> Path:
    """Random networks whose routers shut something; a random VAE."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / CHECKER_FILE).symlink_to(WEIGHTS / CHECKER_FILE)
    torch.manual_seed(0)
    export_learned_vae(*Autoencoder().parts(), folder / CLASS_VAE_FILE)
    for name in ("dit", "sit"):
        model = dit.with_routers(dit.fresh(name, 0))
        with torch.no_grad():
            for key, param in model.named_parameters():
                if param.requires_grad:
                    param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
        save(new_run(model), folder / "run.pt")
        export(folder / "run.pt", dit.CONFIGS[name], NAMES, folder / class_file(name), "A title")
    return folder


@pytest.fixture(scope="module")
def bench(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    return PictureJudge(ClassLab(Settings(tmp_path_factory.mktemp("kept"), PICTURES, weights=weights, of=CLASSES)))


def test_each_model_has_its_rows_for_each_number_of_steps(bench: Judge) -> None:
    jobs = class_lineup(bench.lab, [4, 8], [0.75])
    assert list(dict.fromkeys(job.table for job in jobs)) == ["DyDiT 4", "DyDiT 8", "DySiT 4", "DySiT 8"]
    some = [(job.name, job.asked) for job in jobs if job.table == "DySiT 8"]
    assert some == [("dense", 1.0), ("dense, another seed", 1.0), (OWN, 1.0), ("its routers × nothing", 0.75), ("changed × reuse", 0.75),
                    ("random × nothing", 0.75), (f"{FEWER} (6)", 0.75)]


@pytest.mark.parametrize("model", ["DyDiT", "DySiT"])
def test_rows_spend_what_was_asked_and_the_files_threshold_what_it_says(bench: Judge, model: str) -> None:
    dense = Shot(model, 4)
    own, asked, few = (bench.measure(shot, dense) for shot in (
        replace(dense, method=OWN), replace(dense, method="changed × reuse", budget=0.8), replace(dense, steps=2)))
    assert 0.3 < own.spent < 0.95 and own.psnr is not None
    assert asked.spent == pytest.approx(0.8, abs=0.02) and few.spent == 0.5
    # Two blocks of width 32 on 256 tokens, by hand: linear layers, attention, then the adaLN vectors.
    by_hand = 2 * (2 * 256 * 12 * 32**2 + 4 * 256**2 * 32 + 6 * 2 * 32**2)
    assert bench.lab.gigaflops(dense, 1.0) == pytest.approx(4 * by_hand / 1e9, rel=1e-6)


@pytest.mark.parametrize("model", ["DyDiT", "DySiT"])
@pytest.mark.parametrize("method", ["changed × reuse", "random × nothing"])
def test_the_floor_of_a_row_is_what_it_spends_where_nothing_is_asked(bench: Judge, model: str, method: str) -> None:
    dense = Shot(model, 4)
    spent = bench.measure(replace(dense, method=method, budget=0.0), dense).spent
    assert bench.lab.floor(model, method, 4) == pytest.approx(spent, abs=0.01) and spent < 0.9


def test_classes_take_turns(bench: Judge) -> None:
    assert bench.lab.conditioning[0].tolist() == [*range(14), 0]
    assert bench.lab.take(Shot("DyDiT", 2)).latents.shape == (PICTURES, 4, 32, 32)


def test_one_command_writes_tables_and_plots(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    args = build_parser().parse_args(["bench", "quality", "--of", "classes", "--weights", str(weights), "--prompts", "2", "--steps", "2", "--budgets", "0.75",
                                      "--only", "changed", "fewer", "--out", str(out)])
    args.run(args)
    page = out.read_text()
    assert "2 pictures of classes in turn" in page and "## DyDiT 2 steps" in page and "](quality_DySiT_2.png)" in page
    assert (tmp_path / "quality_DyDiT_2.png").exists()


def test_without_a_model_it_says_what_to_do(tmp_path: Path) -> None:
    args = build_parser().parse_args(["bench", "quality", "--of", "classes", "--weights", str(tmp_path)])
    with pytest.raises(SystemExit, match="holds neither a small DyDiT nor a small DySiT; make them: python -m dydit_core.demo.make_dit"):
        args.run(args)
