"""The speed benchmark's arithmetic, order and checks, on a toy; no clock is trusted here."""

from __future__ import annotations

import pytest
import torch
from toy import CONFIG

from dydit_core.__main__ import COMMANDS, build_parser
from dydit_core.bench import flux, lanes, report, timing, trace
from dydit_core.bench.lanes import NAMES, methods, open_lanes, synthetic_widths
from dydit_core.bench.published import OFFICIAL_KEEP, whole_model
from dydit_core.bench.subject import ARCHITECTURES, Subject, for_cpu
from dydit_core.bench.timing import Lane, measure, summarise
from dydit_core.layouts import LIMIT_BYTES
from dydit_core.parts import BlockCost, Outlook, Setting
from dydit_core.routers.learned import LearnedRouter
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
    cells = [cell.strip() for cell in timing.layout([row]).splitlines()[-1].strip("|").split("|")]
    assert cells == ["ours", "0.5", "0.500", "2", "1.50", "1.67", "90%"]


def test_flops_that_were_not_booked_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="counted.*booked"):
        summarise(lane([1.0]), [1.0, 0.5, 0.5], 61.0, lane([1.0]), 100.0, 80.0)


def test_lanes_take_turns(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, float]] = []
    monkeypatch.setattr(Lane, "evaluate", lambda self, subject, forward, sigma: order.append((self.name, sigma)))
    three = [Lane("dense"), Lane("a"), Lane("b")]
    measure(subject, three, [0.9, 0.8])
    assert order == [(name, sigma) for sigma in (0.9, 0.8) for name in ("dense", "a", "b")]
    assert all(len(each.seconds) == 2 for each in three)


def test_every_lane_records_its_map(subject: Subject) -> None:
    opened = open_lanes(subject, list(NAMES), [0.75], [1.0, 0.5], 8)
    assert [each.run is None for each in opened] == [True] + 5 * [False]
    assert all(each.run.recorder is not None and each.run.layouts.limit == LIMIT_BYTES // 2 for each in opened[1:])
    timing.close(opened)
    blocks = [float(part) for part in methods(subject)["tokens"].router.table.at(torch.tensor([0.5]))[0].median(-1).values]
    assert blocks == sorted(blocks) and blocks[0] < blocks[-1], "the synthetic router wants different capacities"


@pytest.mark.parametrize("budget, expected", [(0.9, 0.25), (0.75, 0.40), (0.5, 0.50)])
def test_synthetic_widths_flip_between_the_measured_evaluations(budget: float, expected: float) -> None:
    """At FLUX's 24 heads and 24 groups, for 57 blocks: as the bench says."""
    torch.manual_seed(0)
    state = LearnedRouter(width=synthetic_widths(57, 24)).start(Setting(()))
    costs, sigmas = [BlockCost(0.3, heads=1.0, groups=1.0)] * 57, torch.tensor(timing.schedule(5), dtype=torch.float64)
    chosen = [state.keep(Outlook(sigmas[at:], budget, at, budget * at, 0.0, costs, 64)).widths for at in range(2, 7)]
    changed = [str(one.heads) != str(two.heads) for before, after in zip(chosen, chosen[1:]) for one, two in zip(before, after)]
    assert sum(changed) / len(changed) == pytest.approx(expected, abs=0.01)
    assert all(len({str(width.heads) for width in evaluation}) > 50 for evaluation in chosen), "blocks differ"


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def bench(subject: Subject, chosen: list[str], budgets: list[float], repetitions: int) -> list[list[str]]:
    steps = timing.schedule(repetitions)
    return rows(timing.report(subject, open_lanes(subject, chosen, budgets, steps, 4), steps, repetitions))


def test_the_whole_bench_on_a_toy(subject: Subject) -> None:
    cells = bench(subject, list(NAMES), [0.9, 0.6], repetitions=2)
    assert [row[0] for row in cells] == ["dense", *(name for name in NAMES.values() for _ in range(2))]
    assert cells[0][1:3] == ["1", "1.000"] and cells[0][4:] == ["1.00", "1.00", "100%"]
    for row in cells[1:]:
        # Two heads and two groups a block come in large steps.
        assert float(row[2]) == pytest.approx(float(row[1]), abs=0.05 if "width" not in row[0] else 0.15)
        assert float(row[5]) > 1.0
    for block in (*subject.model.double_blocks, *subject.model.single_blocks):
        assert "forward" not in block.__dict__


def test_the_published_forward_gives_what_ours_gives(subject: Subject) -> None:
    """The same tokens kept, fewer FLOPs; at full capacity both are the model's own."""
    for keep in (0.44, 1.0):
        steps = timing.schedule(1)
        opened = flux.keep_lanes(subject, keep, steps)
        with torch.inference_mode():
            dense, theirs, ours = (lane.evaluate(subject, subject.prepare(0.7), 0.7) for lane in opened)
        timing.close(opened)
        assert float((ours - theirs).abs().max()) < 1e-5 * float(dense.abs().max())
        assert (float((ours - dense).abs().max()) < 1e-5 * float(dense.abs().max())) == (keep == 1.0)
        masks = [lane.run.recorder.evaluations[0].mask() for lane in opened[1:]]
        assert (masks[0] == masks[1]).all() and masks[0].mean() == pytest.approx(keep, abs=0.01)
    steps = timing.schedule(2)
    dense, theirs, ours = rows(timing.report(subject, flux.keep_lanes(subject, 0.44, steps), steps, 2, "kept"))
    assert 1.0 > float(theirs[2]) > float(ours[2])


def test_arithmetic_of_the_published_figures() -> None:
    """FLUX-lite, 4,096 + 512 tokens: 30.0 T MACs dense and 21.2 T published; ours without dead queries is 17.9 T."""
    macs = whole_model(ARCHITECTURES["lite"], OFFICIAL_KEEP)
    assert [round(value / 1e12, 2) for value in macs.values()] == [30.01, 21.2, 17.9]
    lines = flux.arithmetic(ARCHITECTURES["lite"], OFFICIAL_KEEP).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:]] == ["1.00", "1.42", "1.68"]
    args = build_parser().parse_args(["bench", "flux", "--keep", "official"])
    assert args.keep == OFFICIAL_KEEP and for_cpu(ARCHITECTURES["lite"]).depth_single_blocks == 5
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "flux", "--keep", "0"])


def test_a_forward_that_is_not_the_models_is_caught(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    state = type(Nothing().start())
    monkeypatch.setattr(lanes, "Reuse", Nothing)
    monkeypatch.setattr(state, "update", lambda self, block, residual, *rest: residual)
    with pytest.raises(RuntimeError, match="full capacity differs"):
        bench(subject, ["changed"], [0.6], repetitions=1)


def test_a_router_that_counts_wrong_is_caught(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    book = Run.book
    monkeypatch.setattr(Run, "book", lambda self, executed, *rest: book(self, 0.9 * executed, *rest))
    with pytest.raises(RuntimeError, match="booked"):
        bench(subject, ["tokens"], [0.6], repetitions=1)


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


def test_the_machine_is_named() -> None:
    line = report.machine(CPU)
    count = torch.get_num_threads()
    assert f"{count} thread{'s' if count > 1 else ''}; " in line and torch.__version__ in line


def test_what_a_record_costs(capsys: pytest.CaptureFixture) -> None:
    trace.run(build_parser().parse_args(["bench", "trace", "--sides", "4", "72", "--steps", "2"]))
    *_, small, large = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [small[0], large[0]] == ["64²", "1152²"] and len(small) == len(large) == 9
    assert [float(row[-1]) for row in (small, large)] == [pytest.approx(2 * bits / 2**20, abs=0.01) for bits in (
        57 * 2 * 2 + 2 * 16 * 2, 57 * 2 * 72 * 9 + 2 * 64 * 64 * 2)]
