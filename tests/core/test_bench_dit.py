"""`bench dit`: its routers decide as often as they should, its lanes decide alike, and what it books is what is counted. No clock is trusted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_dit import SMALL, tensors
from safetensors.torch import save_file

from dydit_core import flops
from dydit_core.__main__ import build_parser
from dydit_core.bench import dit
from dydit_core.bench.class_speed import bench, layout, open_lanes
from dydit_core.bench.dit import XL
from dydit_core.bench.dit_routers import HALF, rates_of, routers_like
from dydit_core.bench.dit_subject import DiTSubject
from dydit_core.bench.probe import count
from dydit_core.bench.timing import close
from dydit_core.checkpoints.files import FileError
from dydit_core.models.dit import DiTConfig
from dydit_core.parts import Geometry
from dydit_core.routers.dit import DiTRouters
from dydit_core.sampling import eps_sigmas

CONFIG = DiTConfig(hidden_size=64, depth=3, num_heads=8, side=16, classes=10)
STEPS = eps_sigmas(50)[:-1]


@pytest.fixture(scope="module")
def subject() -> DiTSubject:
    return DiTSubject(CONFIG, 3, torch.device("cpu"), torch.float32)


@pytest.fixture(scope="module")
def routers(subject: DiTSubject) -> DiTRouters:
    return routers_like(HALF, subject, STEPS)


def test_the_table_is_about_what_the_paper_executes() -> None:
    """DyDiT-XL/2 at λ = 0.5: 57.88 of 118.69 GMACs."""
    rates, cost = HALF.stretched(XL.depth), flops.dit_block(Geometry(XL.tokens, 0, XL.hidden_size, XL.mlp_ratio), XL.tokens)
    spent = sum(cost.at(XL.tokens * float(tokens), float(heads), float(groups)) for heads, groups, tokens in zip(rates.heads, rates.groups, rates.tokens))
    assert spent / (XL.depth * cost.at(XL.tokens)) == pytest.approx(57.88 / 118.69, abs=0.01)


def test_routers_decide_at_the_rates_of_the_table(subject: DiTSubject, routers: DiTRouters) -> None:
    rates = HALF.stretched(3)
    embedding = subject.family.time_embedding(subject.model, subject.backend, torch.tensor(STEPS), torch.float32)
    for logits, rate in zip(routers.unit_logits(embedding), (rates.heads, rates.groups)):
        on = logits > 0
        torch.testing.assert_close(on.float().mean((0, 2)), rate, rtol=0, atol=0.01)
        assert on[..., 0].all() and not on[..., 1:].all()
        # A unit goes on or off once in a run at most.
        assert int((on[1:] != on[:-1]).sum(0).max()) == 1
    lanes = open_lanes(subject, routers, (), STEPS, XL.depth)
    with torch.inference_mode():
        lanes[2].evaluate(subject, subject.prepare(STEPS[25]), STEPS[25])
    close(lanes)
    kept = lanes[2].run.recorder.evaluations[0].mask().mean((1, 2))
    assert kept == pytest.approx(rates.tokens.numpy(), abs=0.12), "what was skipped moves the later blocks a little"


def test_masked_as_published_and_ours_give_the_same(subject: DiTSubject, routers: DiTRouters) -> None:
    dense, masked, ours = lanes = open_lanes(subject, routers, (), STEPS, XL.depth)
    forward = subject.prepare(STEPS[30])
    with torch.inference_mode():
        outputs = [lane.evaluate(subject, forward, STEPS[30]) for lane in lanes]
        spent = [count(lambda: lane.evaluate(subject, forward, STEPS[31])) for lane in lanes]
    close(lanes)
    scale = float(outputs[0].abs().max())
    assert float((outputs[1] - outputs[2]).abs().max()) < 1e-5 * scale < float((outputs[0] - outputs[2]).abs().max())
    one, other = (lane.run.recorder.evaluations[0] for lane in (masked, ours))
    assert (one.mask() == other.mask()).all() and (one.heads.values() == other.heads.values()).all() and (one.groups.values() == other.groups.values()).all()
    # Of the published forward only the routers come to what is dense.
    assert spent[0] < spent[1] < 1.01 * spent[0] and spent[2] < 0.6 * spent[0]


def test_the_whole_bench_on_a_toy(subject: DiTSubject, routers: DiTRouters) -> None:
    """`summarise` compares the FLOPs counted with those booked, so a padded token would be an error here."""
    rows = [(3, row) for row in bench(subject, routers, (0.75, 0.5), 2, XL.depth)]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in layout(rows, "picture").splitlines()[2:]]
    assert [row[:2] for row in cells] == [[name, "3"] for name in (
        "dense", "as published: masks", "ours, own threshold", "ours, budget 0.75", "ours, budget 0.5")]
    assert cells[0][2:4] == ["all", "1.000"] and cells[0][6:] == ["1.00", "1.00", "100%"]
    masked, own, *budgets = cells[1:]
    assert float(masked[3]) == pytest.approx(1.0, abs=0.01) and float(own[3]) == pytest.approx(0.49, abs=0.1)
    assert masked[2] == own[2] and "–" in own[2], "pictures of a batch keep different numbers"
    for row, budget in zip(budgets, (0.75, 0.5)):
        assert float(row[3]) == pytest.approx(budget, abs=0.1) and "–" not in row[2]
    assert not any("forward" in block.__dict__ for block in subject.model.blocks)


def test_rates_of_a_trained_file(tmp_path: Path) -> None:
    """Routers that say one thing whatever they see: heads 0 to 2, all groups, every token of block 0 and none of block 1."""
    given = tensors()
    for key, value in given.items():
        if "router" in key or "mlp_head" in key:
            value.zero_()
    for block in (0, 1):
        given[f"blocks.{block}.attn_rate.router.bias"] += torch.tensor([1.0, 1.0, -1, -1, -1, -1, -1])
        given[f"blocks.{block}.mlp_rate.router.bias"] += 1.0
    given["blocks.0.token_selection.mlp_head.2.bias"] += 1.0
    given["blocks.1.token_selection.mlp_head.2.bias"] -= 1.0
    for prediction in ("eps", "flow"):
        save_file(given, tmp_path / "a.safetensors", {"prediction": prediction})
        rates = rates_of(tmp_path / "a.safetensors", steps=2, rows=2)
        assert rates.heads.tolist() == [0.375, 0.375] and rates.groups.tolist() == [1.0, 1.0] and rates.tokens.tolist() == [1.0, 0.0]
    assert rates.stretched(3).tokens.tolist() == [1.0, 0.5, 0.0]
    assert str(rates).endswith("tokens 0.50 (0.00–1.00)")


def test_a_file_without_routers_has_no_rates(tmp_path: Path) -> None:
    save_file(tensors(replace(SMALL, hidden_size=384, num_heads=6), None), tmp_path / "a.safetensors", {"prediction": "eps"})
    with pytest.raises(FileError, match="a.safetensors is DiT-384×2/2, .*, no routers; choose a DyDiT"):
        rates_of(tmp_path / "a.safetensors")


@pytest.mark.parametrize("given, words", [(["--repetitions", "30"], "half of 50 steps are 25 evaluations; ask for at most 22"),
                                          (["--like", "gone.safetensors"], "gone.safetensors is not a file"),
                                          *([] if torch.cuda.is_available() else [(["--device", "cuda"], "there is no CUDA device here")])])
def test_what_the_command_refuses(given: list[str], words: str) -> None:
    args = build_parser().parse_args(["bench", "dit", *given])
    assert args.run is dit.run
    with pytest.raises(SystemExit, match=words):
        args.run(args)


def test_numbers_of_rows_and_blocks() -> None:
    args = build_parser().parse_args(["bench", "dit", "--batch", "1", "8"])
    assert args.batch == [1, 8] and args.blocks is None and args.budgets == (0.5,)
    with pytest.raises(SystemExit):
        build_parser().parse_args(["bench", "dit", "--batch", "0"])
