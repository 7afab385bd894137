"""The quality tables: what is measured, what is kept, which rows there are, and what they say."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hosting import require_import

from dydit_core.__main__ import build_parser
from dydit_core.bench import influence, judge, quality, quality_page
from dydit_core.bench.contenders import OPEN, SHIPPED_TWIN
from dydit_core.bench.judge import Judge, Measured, PictureJudge, frechet
from dydit_core.bench.lab import BASE, SCENES, TWIN, Lab, Settings, Shot, digest
from dydit_core.bench.lineup import FEWER, Job, lineup
from dydit_core.bench.quality_page import Row, chart, markdown
from dydit_core.bench.results import Results
from dydit_core.checkpoints.adapter import load_adapter, save_adapter
from dydit_core.demo.base import load_base
from dydit_core.demo.files import ADAPTER_FILE, BASE_FILE, TWIN_FILE, WEIGHTS
from dydit_core.lora import new_lora, save_lora

require_import("torchmetrics")
PROMPTS = 2


@pytest.fixture(scope="module", autouse=True)
def small() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(influence, "PROMPTS", 1)
        patch.setattr(influence, "STEPS", 1)
        patch.setattr(judge, "REAL_SCENES", 16)
        yield


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's weights, with a random twin."""
    folder = tmp_path_factory.mktemp("weights")
    for part in WEIGHTS.iterdir():
        if part.name != TWIN_FILE.parent.name:
            (folder / part.name).symlink_to(part)
    torch.manual_seed(0)
    lora = new_lora(load_base(WEIGHTS / BASE_FILE), rank=1)
    for up in lora.up:
        torch.nn.init.normal_(up, std=0.02)
    save_lora(folder / TWIN_FILE, lora, {})
    return folder


@pytest.fixture(scope="module")
def twin_adapter(weights: Path) -> Path:
    """An adapter that differs from a shipped one in its title alone."""
    adapter, path = load_adapter(weights / ADAPTER_FILE), weights / "other.safetensors"
    save_adapter(path, replace(adapter, facts=replace(adapter.facts, title="another")))
    return path


@pytest.fixture(scope="module")
def bench(weights: Path, twin_adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Judge:
    settings = Settings(tmp_path_factory.mktemp("kept"), PROMPTS, bfloat16=True, weights=weights, twin_adapters={"other": twin_adapter})
    return PictureJudge(Lab(settings))


# --- what is measured

def test_the_frechet_distance_of_shifted_activations_is_the_shift_squared() -> None:
    some = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    assert frechet(some, some) == pytest.approx(0.0, abs=1e-6)
    assert frechet(some + torch.tensor([2.0] + 7 * [0.0]), some) == pytest.approx(4.0, rel=1e-4)
    assert frechet(3 * some, some) == pytest.approx(4 * float(some.var(0).sum() + some.mean(0).square().sum()), rel=1e-3)


def test_a_row_is_held_to_its_reference(bench: Judge) -> None:
    dense = Shot(BASE, 2)
    same, one = bench.measure(dense, dense), bench.measure(Shot(BASE, 1), dense)
    assert same.psnr is same.psnr_detail is None and same.ssim == pytest.approx(1.0) and same.spent == 1.0
    assert one.spent == 0.5 and one.gigaflops == pytest.approx(same.gigaflops / 2) and one.ssim < 1.0
    assert 15 < one.psnr_detail < one.psnr < 45 and same.fid != one.fid
    # 272 tokens through 6 blocks of width 384, by hand: linear layers, then attention, then the adaLN vectors.
    by_hand = 2 * (6 * 272 * 12 * 384**2) + 4 * 6 * 272**2 * 384 + 2 * (2 * 12 + 4 * 3) * 384**2
    assert same.gigaflops == pytest.approx(2 * by_hand / 1e9, rel=1e-6)


def test_the_scenes_themselves_are_what_their_prompts_say(bench: Judge) -> None:
    found = bench.measure(Shot(SCENES, 0), Shot(BASE, 2))
    assert found.accuracy == 1.0 and found.gigaflops == 0.0 and found.seconds is None


def test_dense_latents_are_sampled_once(bench: Judge, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.lab.take(Shot(BASE, 1)).latents
    monkeypatch.setattr(Lab, "_sample", None)
    assert torch.equal(bench.lab.take(Shot(BASE, 1)).latents, first)


# --- what is kept

def test_the_second_run_measures_nothing(bench: Judge, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    dense = Shot(BASE, 2)
    jobs = [Job("2", 1.0, "dense", dense, dense), Job("2", 0.75, "random × nothing", replace(dense, method="random × nothing", budget=0.75), dense)]
    rows = quality.collect(bench, jobs)
    assert rows[1].measured.spent == pytest.approx(0.75, abs=0.01)
    monkeypatch.setattr(Judge, "measure", None)
    assert quality.collect(bench, jobs) == rows
    assert "2 of 2 rows are there" in capsys.readouterr().out


def test_measurements_come_back_by_all_that_decided_them(tmp_path: Path) -> None:
    measured = Measured(spent=0.5, psnr=None, psnr_detail=31.25, ssim=0.9, accuracy=1.0, fid=12.0, gigaflops=6.5, seconds=None)
    Results(tmp_path / "rows.json").put({"shot": {"steps": 4, "budget": 0.5}}, measured)
    kept = Results(tmp_path / "rows.json")
    assert kept.get({"shot": {"budget": 0.5, "steps": 4}}) == measured
    assert kept.get({"shot": {"budget": 0.5, "steps": 8}}) is None


def test_another_weight_file_is_another_measurement(bench: Judge, twin_adapter: Path) -> None:
    """The same gates in another file; rows that no adapter has a part in stay."""
    shots = [Shot(TWIN, 4, name, 0.5) for name in ("SDT × reuse", "other × reuse", "changed × reuse")]
    shipped, other, changed = (bench.lab.key(shot)["files"] for shot in shots)
    assert shipped[:-1] == other[:-1] == changed and shipped[-1] != other[-1] == digest(twin_adapter)
    assert len(bench.lab.key(Shot(BASE, 4))["files"]) == 2 and len(changed) == 3


# --- which rows there are

def test_every_table_has_its_rows(bench: Judge) -> None:
    jobs = lineup(bench.lab, [4], [0.75, 0.35])
    names = {table: [job.name for job in jobs if (job.table, job.asked) == (table, 0.35)] for table in ("4", TWIN)}
    trained = [f"{gates} × {stand_in}" for stand_in in ("nothing", "reuse")
               for gates in ("SDT", "TDW", "SDT+TDW", "SDT+TDW+TD-LoRA", "SDT, made for reuse")]
    assert names["4"] == [*trained, "changed × reuse", "alternate steps × reuse", "random × reuse", "random × nothing", "layer skip × nothing",
                          "width by magnitude × nothing", f"{FEWER} (1)"]
    assert set(names[TWIN]) - set(names["4"]) == {
        f"{gates} × {stand_in}" for gates in ("other", *SHIPPED_TWIN.values()) for stand_in in ("nothing", "reuse")}
    assert [job.name for job in jobs if job.table == "4" and job.asked == 1] == ["dense", "dense, another seed", f"SDT+TDW+TD-LoRA, {OPEN}"]
    assert {job.reference for job in jobs if job.table == TWIN} == {Shot(TWIN, 4)}
    assert [(job.shot.model, job.shot.steps) for job in jobs if job.table == "near"] == [(BASE, 20), (BASE, 4), (TWIN, 4)]
    fewer = {job.asked: job.shot for job in jobs if job.table == "4" and job.family == FEWER}
    assert fewer == {0.75: Shot(BASE, 3), 0.35: Shot(BASE, 1)}
    assert {job.name for job in lineup(bench.lab, [4], [0.5], ["skip"])} == {"dense", "layer skip × nothing"}


def test_below_its_floor_a_row_is_measured_once(bench: Judge) -> None:
    jobs = {(job.name, job.asked): job for job in lineup(bench.lab, [4], [0.9, 0.5, 0.35]) if job.table == "4"}
    half, third = jobs["changed × reuse", 0.5], jobs["changed × reuse", 0.35]
    assert half.floored and third.floored and half.shot == third.shot and half.shot.budget == 0.0
    assert bench.lab.floor(BASE, "changed × reuse", 4) == pytest.approx(0.515, abs=0.001)
    assert jobs["changed × reuse", 0.9].shot.budget == 0.9 and not jobs["layer skip × nothing", 0.35].floored


def test_without_its_file_there_is_no_twin(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part in weights.iterdir():
        if part.name != TWIN_FILE.parent.name:
            (tmp_path / part.name).symlink_to(part)
    lab = Lab(Settings(tmp_path, PROMPTS, bfloat16=True, weights=tmp_path))
    assert {job.table for job in lineup(lab, [4], [0.5])} == {"check", "4"}


def test_the_twin_draws_other_pictures_than_the_base(bench: Judge) -> None:
    base, twin = (bench.lab.take(Shot(model, 1)).latents for model in (BASE, TWIN))
    assert 0.01 < float((twin - base).std()) < 1.0


# --- what the page says

def rows_of(*cells: tuple[str, float, float, float, bool]) -> list[Row]:
    """Name, asked, spent, PSNR, trained."""
    shot = Shot(BASE, 8)
    return [Row(Job("8", asked, name, shot, shot, "" if asked == 1 else FEWER if name.startswith(FEWER) else name, trained),
                Measured(spent=spent, psnr=psnr, psnr_detail=psnr, ssim=0.9, accuracy=1.0, fid=3.0, gigaflops=6.5, seconds=None)) for name, asked, spent, psnr, trained in cells]


ROWS = rows_of(("dense", 1.0, 1.0, None, False), ("at its floor", 0.5, 0.53, 40.0, True), ("gates", 0.5, 0.515, 33.5, True),
               ("worse gates", 0.5, 0.5, 30.0, True), ("changed × reuse", 0.5, 0.5, 31.0, False), (f"{FEWER} (4)", 0.5, 0.5, 32.0, False),
               ("gates", 0.75, 0.8, 50.0, True), ("changed × reuse", 0.75, 0.75, 41.0, False), (f"{FEWER} (6)", 0.75, 0.75, 42.0, False))


def test_a_row_that_spent_too_much_is_not_the_best() -> None:
    """Bold is for the row nearest to dense of those within 0.02 of what was asked, fewer steps among them."""
    page = markdown(ROWS, Settings(Path()), "a machine")
    assert [line.split("|")[1].strip() for line in page.splitlines() if "**" in line] == ["**gates**", f"**{FEWER} (6)**"]
    assert "- At 0.5: best trained gates 33.5 dB, best untrained changed × reuse 31.0 dB, fewer steps (4) 32.0 dB. Trained beats untrained by 2.5 dB." in page
    assert "- At 0.75: best untrained changed × reuse 41.0 dB, fewer steps (6) 42.0 dB." in page.splitlines()


def test_a_plot_has_one_line_for_each_family(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several methods in a family, the one that is best over all budgets."""
    drawn: list = []
    monkeypatch.setattr(quality_page, "lines", lambda title, x, y, series: drawn.extend(series))
    family = [replace(row, job=replace(row.job, family="trained")) if "gates" in row.job.name else row for row in ROWS[2:]]
    chart(family)
    assert [one.name for one in drawn] == ["gates", "changed, reuse", FEWER]
    assert [(point.x, point.y) for point in drawn[1].points] == [(0.5, 31.0), (0.75, 41.0)]
    assert chart(ROWS[:1]) is None


# --- the command

def test_the_command_takes_adapters_by_name(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    file.touch()
    args = build_parser().parse_args(["bench", "quality", "--adapter", f"any={file}", "--adapter", f"one={file}", "--processes", "2"])
    assert args.run is quality.run and dict(args.adapter) == {"any": file, "one": file} and args.twin_adapter == []
    assert (args.prompts, args.cfg, args.steps, args.budgets) == (256, 1.0, None, [0.9, 0.75, 0.5, 0.35])
    for wrong in ("any", "=x", f"any={tmp_path / 'absent'}"):
        with pytest.raises(SystemExit):
            build_parser().parse_args(["bench", "quality", "--adapter", wrong])


def test_one_command_writes_tables_and_plots(tmp_path: Path) -> None:
    out = tmp_path / "table.md"
    args = build_parser().parse_args(["bench", "quality", "--prompts", "2", "--steps", "1", "--budgets", "0.75", "--bfloat16", "--only", "magnitude", "fewer",
                                      "--out", str(out)])
    args.run(args)
    page = out.read_text()
    assert "| width by magnitude × nothing |" in page.replace("**", "") and "2 held-out prompts" in page
    assert (tmp_path / "quality_1.png").stat().st_size > 1000 and "](quality_1.png)" in page
    assert {path.name for path in (tmp_path / "table.cache").iterdir()} >= {"rows.json"}
