"""The speed benchmark's arithmetic, order and checks, on a toy; no clock is trusted here."""

from __future__ import annotations

from argparse import Namespace

import pytest
import torch
from toy import CONFIG

from dydit_core.__main__ import COMMANDS, build_parser
from dydit_core.bench import flux, quality, report
from dydit_core.bench.flux import Lane, Subject, measure, methods, open_lanes, summarise
from dydit_core.runtime import Run
from dydit_core.substitutes.nothing import Nothing

CPU = torch.device("cpu")


@pytest.fixture
def subject() -> Subject:
    return Subject(CONFIG, 4, 5, CPU, torch.float32)


def lane(seconds: list[float], budget: float = 0.5) -> Lane:
    return Lane("ours", budget, None, seconds)


def test_a_row_is_medians_against_what_flops_allow() -> None:
    """Blocks 80, outside 20; the lane books half the blocks: 100 ÷ 60 in theory, 3 s ÷ 2 s in fact."""
    row = summarise(lane([2.0, 2.0, 9.0]), [1.0, 0.6, 0.4, 0.5, 0.6], 20 + 0.6 * 80, lane([3.0, 1.0, 4.0]), 100.0, 80.0)
    assert row.fraction == pytest.approx(0.5) and row.seconds == 2.0
    assert row.theory == pytest.approx(100 / 60) and row.speed_up == pytest.approx(1.5)
    cells = [cell.strip() for cell in flux.layout([row]).splitlines()[-1].strip("|").split("|")]
    assert cells == ["ours", "0.5", "0.500", "2", "1.50", "1.67", "90%"]


def test_flops_that_were_not_booked_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="counted.*booked"):
        summarise(lane([1.0]), [1.0, 0.5, 0.5], 61.0, lane([1.0]), 100.0, 80.0)


def test_lanes_take_turns(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, float]] = []
    monkeypatch.setattr(Lane, "evaluate", lambda self, subject, forward, sigma: order.append((self.name, sigma)))
    lanes = [Lane("dense"), Lane("a"), Lane("b")]
    measure(subject, lanes, [0.9, 0.8])
    assert order == [(name, sigma) for sigma in (0.9, 0.8) for name in ("dense", "a", "b")]
    assert all(len(each.seconds) == 2 for each in lanes)


def test_every_lane_records_its_map(subject: Subject) -> None:
    lanes = open_lanes(subject, [0.75], [1.0, 0.5])
    assert [each.run is None for each in lanes] == [True, False, False]
    for each in lanes[1:]:
        assert each.run.recorder is not None
        each.run.finish()
        each.run.recorder.finish()
    blocks = [float(part) for part in methods(subject)["learned tokens, nothing"].router.table.at(torch.tensor([0.5]))[0].median(-1).values]
    assert blocks == sorted(blocks) and blocks[0] < blocks[-1], "the synthetic router wants different capacities"


def test_the_whole_bench_on_a_toy(subject: Subject) -> None:
    lines = flux.report(subject, [0.9, 0.6], repetitions=2).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [row[0] for row in cells[2:]] == ["dense"] + 2 * ["learned tokens, nothing"] + 2 * ["changed tokens, reuse"]
    assert cells[2][1:3] == ["1", "1.000"] and cells[2][4:] == ["1.00", "1.00", "100%"]
    for row in cells[3:]:
        assert float(row[2]) == pytest.approx(float(row[1]), abs=0.05)
        assert float(row[5]) > 1.0
    for block in (*subject.model.double_blocks, *subject.model.single_blocks):
        assert "forward" not in block.__dict__


def test_a_forward_that_is_not_the_models_is_caught(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    state = type(Nothing().start())
    monkeypatch.setattr(flux, "Reuse", Nothing)
    monkeypatch.setattr(state, "update", lambda self, block, residual, *rest: residual)
    with pytest.raises(RuntimeError, match="full capacity differs"):
        flux.report(subject, [0.6], repetitions=1)


def test_a_router_that_counts_wrong_is_caught(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Run.book
    monkeypatch.setattr(Run, "book", lambda self, executed, *rest: book(self, 0.9 * executed, *rest))
    with pytest.raises(RuntimeError, match="booked"):
        flux.report(subject, [0.6], repetitions=1)


def test_default_types_come_back(subject: Subject) -> None:
    half = Subject(CONFIG, 4, 5, CPU, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32
    assert half.model.img_in.weight.dtype == half.context.dtype == torch.bfloat16
    assert "bfloat16" in str(half) and "16 + 5 tokens" in str(half)


def test_commands_are_modules_with_arguments_and_run() -> None:
    args = build_parser().parse_args(["bench", "flux", "--quick"])
    assert args.run is flux.run and args.device == "cpu" and args.quick
    assert "bench flux" in COMMANDS
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench"])


def test_tables_line_up() -> None:
    lines = report.table(("name", "x"), [("a", "1"), ("longer", "1000")]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[2] == "| a      |    1 |"


def test_a_row_that_spent_too_much_is_not_the_best() -> None:
    """Bold is for the row nearest to dense of those within 0.02 of what was asked, fewer steps among them."""
    rows = [quality.Row(8, asked, name, spent, psnr, psnr, 1.0, 1.0) for name, asked, spent, psnr in (
        ("dense", 1.0, 1.0, float("inf")), ("at its floor", 0.5, 0.53, 40.0), ("ours", 0.5, 0.515, 33.0),
        ("fewer steps (4)", 0.5, 0.5, 32.0), ("above it", 0.75, 0.8, 50.0))]
    table = quality.markdown(rows, Namespace(prompts=2, cfg=1.0, bfloat16=False))
    assert [line.split("|")[2].strip() for line in table.splitlines() if "**" in line] == ["**ours**"]


def test_the_machine_is_named() -> None:
    line = report.machine(CPU)
    assert f"{torch.get_num_threads()} threads" in line and torch.__version__ in line
