"""The quality tables of the small Latte, on a random one of its shape, and the likeness of changes between frames."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_class_adapters import FAST
from training import train

from dydit_core.__main__ import build_parser
from dydit_core.bench.judge import Measured, VideoJudge
from dydit_core.bench.lab import VIDEOS, Settings, Shot
from dydit_core.bench.lineup import FEWER, Job, class_lineup
from dydit_core.bench.quality_page import Row, markdown
from dydit_core.bench.video_lab import LATTE, VideoLab
from dydit_core.checkpoints.files import FileError
from dydit_core.compare import psnr, psnr_of_differences
from dydit_core.demo.autoencoder import Autoencoder
from dydit_core.demo.class_model import export
from dydit_core.demo.files import ADAPTER_FILE, CLASS_VAE_FILE, LATTE_ADAPTER_FILE, LATTE_FILE, WEIGHTS
from dydit_core.demo.moving import NAMES
from dydit_core.demo.vae import export_learned_vae
from dydit_core.models.latte import Latte, LatteConfig
from dydit_core.train.base import new_run, save

COUNT = len(NAMES) + 1
CONFIG = LatteConfig(hidden_size=32, depth=2, num_heads=4, side=8, frames=3, classes=len(NAMES))
TRAINED = "SDT, made for reuse"


# --- the measure

def test_an_error_that_stands_still_is_none_between_frames() -> None:
    video = torch.rand(2, 4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) / 2
    assert psnr_of_differences(video + torch.linspace(0, 0.25, 16), video) > 120
    assert psnr_of_differences(video, video) == math.inf


def test_flicker_is_an_error_twice() -> None:
    """Black, with every second frame 0.1 too bright: each change is off by 0.1, half of the frames are."""
    black = torch.zeros(1, 5, 3, 16, 16)
    flicker = black.clone()
    flicker[:, 1::2] = 0.1
    assert psnr_of_differences(flicker, black) == pytest.approx(20.0, abs=1e-4)
    assert psnr(flicker.flatten(0, 1), black.flatten(0, 1)) == pytest.approx(20.0 + 10 * math.log10(5 / 2), abs=1e-4)


# --- the lab

@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Latte, an adapter trained for it in some steps, a random VAE."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    export_learned_vae(*Autoencoder().parts(), folder / CLASS_VAE_FILE)
    model = Latte(CONFIG)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    save(new_run(model), folder / "run.pt")
    export(folder / "run.pt", CONFIG, NAMES, folder / LATTE_FILE, "A title")
    train("--base", folder / LATTE_FILE, "--work", folder / "work", "--kind", "tokens", *FAST, "--steps", "3",
          "--out", folder / LATTE_ADAPTER_FILE)
    return folder


@pytest.fixture(scope="module")
def bench(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> VideoJudge:
    return VideoJudge(VideoLab(Settings(tmp_path_factory.mktemp("kept"), COUNT, weights=weights, of=VIDEOS)))


def test_the_table_has_its_rows(bench: VideoJudge) -> None:
    jobs = class_lineup(bench.lab, [4], [0.75])
    assert {job.table for job in jobs} == {"Latte 4"}
    assert [(job.name, job.asked) for job in jobs] == [
        ("dense", 1.0), ("dense, another seed", 1.0), (f"{TRAINED} × nothing", 0.75), (f"{TRAINED} × reuse", 0.75),
        ("changed × reuse", 0.75), ("alternate steps × reuse", 0.75), ("random × reuse", 0.75), ("random × nothing", 0.75),
        (f"{FEWER} (3)", 0.75)]


def test_rows_spend_what_was_asked_and_are_held_to_dense_videos(bench: VideoJudge) -> None:
    dense = Shot(LATTE, 4)
    same, other, asked, few = (bench.measure(shot, dense) for shot in (
        dense, replace(dense, seed=12), replace(dense, method="changed × reuse", budget=0.8), replace(dense, steps=2)))
    assert same.psnr is same.psnr_median is same.psnr_differences is None and same.ssim == pytest.approx(1.0) and same.spent == 1.0
    assert other.psnr < asked.psnr and other.psnr_median < asked.psnr_median and other.psnr_differences < asked.psnr_differences and other.ssim < asked.ssim < 1.0
    assert asked.spent == pytest.approx(0.8, abs=0.02) and few.spent == 0.5 and few.gigaflops == pytest.approx(same.gigaflops / 2)
    assert 0 <= same.accuracy <= 1 and same.fid is same.psnr_detail is None
    # A spatial and a temporal block of width 32 on 3 frames of 16 tokens, by hand: linear layers, attention, then the adaLN vectors.
    by_hand = 2 * (2 * 48 * 12 * 32**2 + 6 * 2 * 32**2) + 4 * 48 * (16 + 3) * 32
    assert same.gigaflops == pytest.approx(4 * by_hand / 1e9, rel=1e-6)


def test_classes_take_turns(bench: VideoJudge) -> None:
    assert bench.lab.conditioning[0].tolist() == [*range(len(NAMES)), 0]
    assert bench.lab.pictures(Shot(LATTE, 2))[0].shape == (COUNT, 3, 3, 64, 64)


def test_a_table_has_no_empty_columns() -> None:
    shot = Shot(LATTE, 8)
    rows = [Row(Job("Latte 8", 1.0, "dense", shot, shot), Measured(spent=1.0, psnr=None, ssim=1.0, accuracy=0.9, gigaflops=2.0, seconds=seconds))
            for seconds in (None, 0.5)]
    pages = [markdown(some, Settings(Path(), of=VIDEOS), "a machine") for some in (rows[:1], rows)]
    heads = [[head.strip() for line in page.splitlines() if line.startswith("| method") for head in line.split("|")[1:-1]] for page in pages]
    assert heads[0] == ["method", "asked", "spent", "GFLOPs", "PSNR", "PSNR, median video", "PSNR, frame differences", "SSIM", "direction"]
    assert heads[1] == [*heads[0], "seconds"]


def test_one_command_writes_tables_and_plots(weights: Path, tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    args = build_parser().parse_args(["bench", "quality", "--of", "videos", "--weights", str(weights), "--prompts", "2", "--budgets", "0.75",
                                      "--only", "changed", "fewer", "--out", str(out)])
    args.run(args)
    page = out.read_text()
    assert "2 videos of classes in turn" in page and "## Latte 8 steps" in page and "## Latte 20 steps" in page and "## Latte 4 steps" not in page
    assert "](quality_Latte_8.png)" in page and (tmp_path / "quality_Latte_20.png").exists()


def test_what_does_not_fit_is_said(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="holds no small Latte; make it: python -m dydit_core.demo.make_latte"):
        VideoLab(Settings(tmp_path, weights=tmp_path, of=VIDEOS))
    with pytest.raises(FileError, match="is for another model .*made for a FLUX.*give an adapter of the small Latte"):
        VideoLab(Settings(tmp_path, weights=weights, adapters={"flux": WEIGHTS / ADAPTER_FILE}, of=VIDEOS))
