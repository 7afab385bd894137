"""`bench latte`: the lanes of `bench dit` on a video; routers in both kinds of block, masks equal to ours, FLOPs as booked. No clock is trusted."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from released_dit import tensors
from safetensors.torch import save_file

from dydit_core.__main__ import build_parser
from dydit_core.bench import latte
from dydit_core.bench.class_speed import bench, layout, open_lanes
from dydit_core.bench.dit_routers import HALF, rates_of, routers_like
from dydit_core.bench.dit_subject import DiTSubject
from dydit_core.bench.latte import XL
from dydit_core.bench.probe import count
from dydit_core.bench.timing import close
from dydit_core.checkpoints.dit_keys import RouterSizes
from dydit_core.models.latte import Latte, LatteConfig
from dydit_core.routers.dit import DiTRouters
from dydit_core.sampling import eps_sigmas

CONFIG = LatteConfig(hidden_size=64, depth=4, num_heads=8, side=16, frames=4, classes=10)
STEPS = eps_sigmas(50)[:-1]


@cache
def subject() -> DiTSubject:
    return DiTSubject(CONFIG, 2, torch.device("cpu"), torch.float32)


@cache
def routers() -> DiTRouters:
    return routers_like(HALF, subject(), STEPS)


def test_it_is_about_latte_xl() -> None:
    assert XL.title == "Latte-XL/2" and XL.tokens == 4096 and XL.latent_size == (4, 16, 32, 32)
    assert isinstance(subject().model, Latte) and subject().grid == (4, 8, 8) and subject().family.name == "Latte"


def test_masked_as_published_and_ours_give_the_same() -> None:
    dense, masked, ours = lanes = open_lanes(subject(), routers(), (), STEPS, XL.depth)
    forward = subject().prepare(STEPS[30])
    with torch.inference_mode():
        outputs = [lane.evaluate(subject(), forward, STEPS[30]) for lane in lanes]
        spent = [count(lambda: lane.evaluate(subject(), forward, STEPS[31])) for lane in lanes]
    close(lanes)
    scale = float(outputs[0].abs().max())
    assert float((outputs[1] - outputs[2]).abs().max()) < 1e-5 * scale < float((outputs[0] - outputs[2]).abs().max())
    one, other = (lane.run.recorder.evaluations[0] for lane in (masked, ours))
    assert (one.mask() == other.mask()).all() and (one.heads.values() == other.heads.values()).all() and one.frames == 4
    for kind in (0, 1):
        assert 0.3 < other.mask()[kind::2].mean() < 1 and other.heads.values()[kind::2].mean() < 0.9, "spatial and temporal blocks"
    assert spent[0] < spent[1] < 1.01 * spent[0] and spent[2] < 0.6 * spent[0]


def test_the_whole_bench_on_a_toy() -> None:
    """`summarise` compares the FLOPs counted with those booked."""
    rows = [(2, row) for row in bench(subject(), routers(), (0.75, 0.5), 2, XL.depth)]
    heads, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in layout(rows, "video").splitlines()]
    assert "each video" in heads
    assert [row[0] for row in lines] == ["dense", "as published: masks", "ours, own threshold", "ours, budget 0.75", "ours, budget 0.5"]
    masked, own, *budgets = lines[1:]
    assert float(masked[3]) == pytest.approx(1.0, abs=0.01) and float(own[3]) == pytest.approx(0.49, abs=0.1)
    for row, budget in zip(budgets, (0.75, 0.5)):
        assert float(row[3]) == pytest.approx(budget, abs=0.1)


def test_rates_of_a_file_with_routers(tmp_path: Path) -> None:
    """All heads but the last four, every group, and tokens of spatial blocks alone."""
    config = LatteConfig(hidden_size=64, depth=2, num_heads=8, side=4, frames=2)
    given = tensors(config, RouterSizes(8, 8, 4))
    for key, value in given.items():
        if "router" in key or "mlp_head" in key:
            value.zero_()
    for block in (0, 1):
        given[f"blocks.{block}.attn_rate.router.bias"] += torch.tensor([1.0, 1.0, 1.0, -1, -1, -1, -1])
        given[f"blocks.{block}.mlp_rate.router.bias"] += 1.0
        given[f"blocks.{block}.token_selection.mlp_head.2.bias"] += 1.0 - 2 * block
    save_file(given, tmp_path / "a.safetensors")
    rates = rates_of(tmp_path / "a.safetensors", steps=2, rows=2)
    assert (rates.heads.tolist(), rates.groups.tolist(), rates.tokens.tolist()) == ([0.5, 0.5], [1.0, 1.0], [1.0, 0.0])


@pytest.mark.parametrize("given, words", [(["--blocks", "3"], "blocks come in pairs, a spatial and a temporal one; ask for an even number of --blocks"),
                                          (["--repetitions", "30"], "bench latte: half of 50 steps are 25 evaluations"),
                                          (["--like", "gone.safetensors"], "bench latte: gone.safetensors is not a file")])
def test_what_the_command_refuses(given: list[str], words: str) -> None:
    args = build_parser().parse_args(["bench", "latte", *given])
    assert args.run is latte.run and args.batch == (1,)
    with pytest.raises(SystemExit, match=words):
        args.run(args)
