"""The authors' router: equal to their class on recorded numbers, folded as its equation says, at any budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F
from toy import BLOCKS as TOY_BLOCKS
from toy import Scene, counted_run, schedule

from dydit_core.backend import TorchBackend
from dydit_core.budget import Plan
from dydit_core.checkpoints.convert import convert
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.routers import Routers, load_routers
from dydit_core.families.flux import FluxFamily
from dydit_core.models.flux import Flux, FluxConfig, from_file_key
from dydit_core.parts import Allotment, Extent, Gate, Geometry, Outlook, Setting
from dydit_core.recorder import Recorder
from dydit_core.routers.official import Folded, OfficialRouter, RouterWeights, ThresholdRouter, fold
from dydit_core.routers.quantiles import Quantiles
from dydit_core.runtime import Branches, Method, Run, running
from dydit_core.substitutes.nothing import Nothing

FIXTURE = Path(__file__).parents[1] / "fixtures/dyflux_tiny.safetensors"
FAMILY, BACKEND = FluxFamily(), TorchBackend()
GRID, TEXT, ROWS, BLOCKS, WIDTH = (6, 8), 12, 2, 5, 24
TOKENS = GRID[0] * GRID[1]
SCHEDULE = [1.0, 0.7, 0.3]


@cache
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURE)


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> tuple[Flux, Routers]:
    """Our FLUX and the routers, from the recorded checkpoint as a released .pt, through `convert`."""
    folder = tmp_path_factory.mktemp("released")
    checkpoint = {key.removeprefix("checkpoint."): value for key, value in recorded().items() if key.startswith("checkpoint.")}
    torch.save({"module": checkpoint}, folder / "tiny.pt")
    made = convert(folder / "tiny.pt", folder)
    model = Flux(FluxConfig(WIDTH, 2, 3, in_channels=2, context_in_dim=16, vec_in_dim=16, guidance_embed=True, axes_dim=(2, 2, 4)))
    model.load_state_dict({from_file_key(key): value.float() for key, value in load_file(made.base).items()})
    return model.requires_grad_(False), load_routers(made.routers)


def router(routers: Routers, released: bool) -> OfficialRouter:
    return routers.router.by_threshold() if released else routers.router


class Sampling:
    """Evaluations of the model on the recorded inputs under a router."""

    def __init__(self, model: Flux, made: OfficialRouter, budget: float = 0.5, schedule: list[float] = SCHEDULE) -> None:
        self.model, self.recorder = model, Recorder()
        self.run = Run(Plan(budget, min_keep=0.0), Method(made, Nothing()), schedule, self.recorder)
        self.geometry = Geometry(TOKENS, TEXT, WIDTH)

    def evaluate(self, sigma: float) -> Tensor:
        """Velocity tokens [rows, tokens, channels]."""
        data = {key.removeprefix("input."): value for key, value in recorded().items() if key.startswith("input.")}
        latent = self.model.unpatchify(data["hidden_states"], 2 * GRID[0], 2 * GRID[1])
        self.run.arrive(sigma)
        with running(self.run, FAMILY, self.model, self.geometry, Branches.cond_only(ROWS), ROWS, GRID, BACKEND):
            out = self.model(latent, torch.full((ROWS,), sigma), data["encoder_hidden_states"], data["pooled_projections"], data["guidance"])
        return self.model.patchify(out)

    def masks(self) -> list[np.ndarray]:
        """Of each evaluation, [blocks, rows, tokens]."""
        self.run.finish()
        return [evaluation.mask() for evaluation in self.recorder.finish()]


def test_the_fixture_is_small_and_says_where_it_is_from() -> None:
    with safe_open(FIXTURE, framework="pt") as file:
        words = file.metadata()
    assert "alibaba-damo-academy/DyDiT" in words["source"] and "commit 0ddc5097" in words["source"] and "diffusers 0.30.3" in words["source"]
    assert FIXTURE.stat().st_size < 300_000
    counts = recorded()["sigma_0.7.masks"].sum(2)
    assert counts[:, 0].ne(counts[:, 1]).tolist() == [True, True, False, True, False]
    assert counts[2].tolist() == [TOKENS, TOKENS] and counts[4].tolist() == [0, 0]
    partly = counts[[0, 1, 3]] / TOKENS
    assert 0.2 <= partly.min() and partly.max() <= 0.8


def test_masks_and_outputs_are_the_authors(released: tuple[Flux, Routers]) -> None:
    """At two sigmas of one schedule: the routers are folded at the first and used at the second."""
    sampling = Sampling(released[0], router(released[1], released=True))
    for sigma in (0.7, 0.3):
        out = sampling.evaluate(sigma)
        assert (out - recorded()[f"sigma_{sigma}.output"]).abs().max() < 1e-4
    for sigma, mask in zip((0.7, 0.3), sampling.masks()):
        assert np.array_equal(mask, recorded()[f"sigma_{sigma}.masks"].bool().numpy())


def unfolded(weights: RouterWeights, image: Tensor, text: Tensor, condition: Tensor) -> Tensor:
    """The equation as it is written, in float64."""
    w = {key: value.double() for key, value in vars(weights).items()}
    shift_x, scale_x, shift_t, scale_t = F.linear(F.silu(condition), w["linear"], w["linear_bias"])[:, None].chunk(4, -1)
    a = F.layer_norm(image, image.shape[-1:], w["norm"], w["norm_bias"], 1e-5) * (1 + scale_x) + shift_x
    b = F.layer_norm(text, text.shape[-1:], w["norm"], w["norm_bias"], 1e-5) * (1 + scale_t) + shift_t
    return F.linear(a + b.mean(1, keepdim=True), w["vector"], w["bias"])[..., 0]


def random_weights(width: int = 16, spread: float = 1.0) -> RouterWeights:
    torch.manual_seed(4)
    return RouterWeights(torch.randn(4 * width, width) * 0.2 * spread, torch.randn(4 * width) * spread, 1 + torch.randn(width) * spread,
                         torch.randn(width) * spread, torch.randn(1, width), torch.randn(1))


def test_folding_is_the_equation() -> None:
    weights, conditions = random_weights(), torch.randn(3, 2, 16)
    image, text = torch.randn(2, 9, 16) * 3 + 1, torch.randn(2, 5, 16)
    folded = fold(weights, conditions)
    for index in range(3):
        expected = unfolded(weights, image.double(), text.double(), conditions[index].double())
        assert torch.allclose(folded.at(index, 0.0, torch.arange(2)).logits(image, text).double(), expected, atol=2e-5)


def time_embedding(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.sin(sigmas * k) for k in range(1, 17)], -1).to(dtype)


def gate(sigma: float, block: int = 0, dtype: torch.dtype = torch.float32) -> Gate:
    torch.manual_seed(6)
    image, text, prompt = torch.randn(2, 9, 16), torch.randn(2, 5, 16), torch.randn(2, 16)
    condition = prompt + time_embedding(torch.tensor([sigma]), torch.float32)
    image, text, condition = (x.to(dtype) for x in (image, text, condition))
    return Gate(block, sigma, image, condition, lambda: F.layer_norm(image, (16,)), text, lambda: F.layer_norm(text, (16,)))


def test_between_two_sigmas_of_the_schedule_vectors_are_interpolated() -> None:
    state = OfficialRouter(lambda block: random_weights(), 1).start(Setting([1.0, 0.8, 0.4], time_embedding))
    exact = [state.logits(gate(sigma)) for sigma in (0.8, 0.4)]
    assert torch.allclose(state.logits(gate(0.7)), 0.75 * exact[0] + 0.25 * exact[1], atol=1e-5)
    assert torch.equal(state.logits(gate(0.1)), exact[1])  # below the schedule: its nearest sigma
    assert torch.equal(state.logits(gate(1.2)), state.logits(gate(1.0)))
    at_sigma = unfolded(random_weights(), *(x.double() for x in (gate(0.4).image, gate(0.4).text, gate(0.4).condition)))
    assert torch.allclose(exact[1].double(), at_sigma, atol=2e-5)


def test_each_block_is_read_once_in_a_run() -> None:
    read = []
    made = OfficialRouter(lambda block: read.append(block) or random_weights(), 2)
    state = made.start(Setting(SCHEDULE, time_embedding))
    for sigma in SCHEDULE:
        for block in range(2):
            state.scores(gate(sigma, block))
    assert read == [0, 1]


def test_a_file_that_went_away_is_named(released: tuple[Flux, Routers], tmp_path: Path) -> None:
    gone = replace(released[1], path=tmp_path / "routers.safetensors")
    with pytest.raises(FileError, match=r"routers.safetensors is not a file .*; put it back, or load the routers again\."):
        gone.read(0)


def test_routers_that_are_no_numbers_are_named(released: tuple[Flux, Routers], tmp_path: Path) -> None:
    tensors = load_file(released[1].path)
    tensors["double_blocks.1.token_selection.router.weight"].fill_(torch.nan)
    with safe_open(released[1].path, "pt") as file:
        save_file(tensors, tmp_path / "broken.safetensors", file.metadata())
    broken = load_routers(tmp_path / "broken.safetensors")
    broken.read(0)
    with pytest.raises(FileError, match=r"broken.safetensors has numbers in double_blocks.1.token_selection.router.weight that are not finite"):
        broken.read(1)


@pytest.mark.parametrize("released", [True, False])
def test_rows_are_split_and_joined(released: bool) -> None:
    """As the host splits and joins cond and uncond: each row keeps its own prompt."""
    read = []
    made = OfficialRouter(lambda block: read.append(block) or random_weights(), 1)
    made = made.by_threshold() if released else made
    state, now = made.start(Setting(SCHEDULE, time_embedding)), gate(0.7)
    whole = state.logits(now)
    parts = [state.rows(slice(row, row + 1)) for row in range(2)]
    for row, part in enumerate(parts):
        assert torch.equal(part.logits(some_rows(now, [row])), whole[[row]])
    assert torch.equal(parts[1].joined(parts[:1]).logits(some_rows(now, [1, 0])), whole.flip(0))
    assert read == [0]

    strangers = [made.start(Setting(SCHEDULE, time_embedding)) for _ in range(2)]
    for row, stranger in enumerate(strangers):
        stranger.logits(some_rows(now, [row]))
    assert torch.allclose(strangers[1].joined(strangers[:1]).logits(some_rows(now, [1, 0])), whole.flip(0), atol=1e-5)
    assert read == [0, 0, 0]
    fresh = type(state)(state.router, state.setting)
    assert not parts[0].joined([fresh]).folded
    if not released:
        state.scores(now)
        assert torch.equal(state.rows(slice(0, 1)).measured.table().quantiles, state.measured.table().quantiles)


def some_rows(now: Gate, rows: list[int]) -> Gate:
    tensors = {name: getattr(now, name)[rows] for name in ("image", "text", "condition")}
    return replace(now, **tensors)


def test_pictures_of_one_prompt_share_what_is_folded() -> None:
    made = OfficialRouter(lambda block: random_weights(), 1)
    state, alone = (made.start(Setting(SCHEDULE, time_embedding)) for _ in range(2))
    now = some_rows(gate(0.7), [0, 1, 0, 0, 1])
    logits = state.logits(now)
    assert state.folded[0].image.shape == (len(SCHEDULE), 2, 16)
    assert torch.equal(logits[[0, 1]], alone.logits(gate(0.7)))
    assert torch.equal(logits[2:], logits[[0, 0, 1]])


def test_a_sampler_that_goes_back_up_reads_nothing_again() -> None:
    """Restart samplers: what was folded follows prompt and schedule alone, what was seen of the picture is dropped."""
    read, scene, sigmas = [], Scene(rows=2), schedule(4)
    made = OfficialRouter(lambda block: read.append(block) or random_weights(32), TOY_BLOCKS)
    run, _, evaluations = scene.run(Plan(0.7), Method(made, Nothing()), sigmas, [*sigmas, *sigmas])
    assert sorted(read) == list(range(TOY_BLOCKS))
    assert [evaluation.mask().all() for evaluation in evaluations] == ([True] + [False] * 3) * 2


def test_what_stays_in_memory() -> None:
    folded = fold(random_weights(), torch.randn(28, 1, 16))
    held = sum(part.numel() for part in vars(folded).values())
    assert held == 28 * (2 * 16 + 1)
    flux_lite = 46 * 28 * (2 * 3072 + 1) * 4
    assert flux_lite == 31_659_040 and 4 * flux_lite < 150e6  # up to four prompts
    flux = Extent(Geometry(4096, 256, 3072), 46, 28, 1, element_size=2)
    assert OfficialRouter(lambda block: random_weights(), 46).run_bytes(flux) == flux_lite


@pytest.mark.parametrize("dtype, least", [(torch.float32, 1e-6), (torch.bfloat16, 0.0079), (torch.float16, 0.00098)])
def test_ties_are_off_in_the_models_type(dtype: torch.dtype, least: float) -> None:
    """sigmoid rounds to one half above a logit of 0; the authors' code compares in the model's type."""
    state = ThresholdRouter(lambda block: random_weights(), 1).start(Setting(SCHEDULE, time_embedding))
    state.logits = lambda gate: torch.tensor([[-0.01, 0.0, 0.9 * least, 1.2 * least]])
    on = state.scores(gate(0.7, dtype=dtype)) > 0
    assert on.tolist() == [[False, False, dtype == torch.float32, True]]


# --- at any budget

def outlook(share: float, blocks: int = BLOCKS) -> Outlook:
    costs = FAMILY.costs(Flux(FluxConfig(WIDTH, 2, 3, axes_dim=(2, 2, 4), context_in_dim=16, vec_in_dim=16)), Geometry(TOKENS, TEXT, WIDTH), BACKEND)
    return Outlook(torch.tensor([0.7, 0.3], dtype=torch.float64), share, 0, 0.0, 0.0, costs[:blocks], TOKENS)


@pytest.mark.parametrize("budget", [0.85, 0.7])
def test_a_budget_is_met_by_one_threshold(released: tuple[Flux, Routers], budget: float) -> None:
    sigmas = schedule(10)
    sampling = Sampling(released[0], router(released[1], released=False), budget, sigmas)
    for sigma in sigmas:
        sampling.evaluate(sigma)
    first, *later = sampling.masks()
    assert first.all()
    assert abs(sampling.run.ledger.achieved - budget) < 0.02
    fractions = np.stack([mask.mean((1, 2)) for mask in later])
    assert (np.ptp(fractions, axis=1) > 0.3).all()  # never the same capacity in every block
    assert all((mask.sum(2) == mask.sum(2)[:, :1]).all() for mask in later)  # fixed beforehand, so alike in all rows


@pytest.mark.parametrize("budget", [0.8, 0.65, None])
def test_what_is_counted_around_a_run(budget: float | None) -> None:
    """Counted FLOPs, of routers and folding too, are what is booked, and what was asked where something was asked."""
    scene, sigmas = Scene(rows=2), schedule(8)
    made = OfficialRouter(lambda block: random_weights(32, spread=0.3), TOY_BLOCKS)
    made = made.by_threshold() if budget is None else made
    run, counted = counted_run(scene, Plan(budget or 0.5), Method(made, Nothing()), sigmas)
    assert counted == pytest.approx(run.ledger.achieved, abs=0.02)
    assert budget is None or counted == pytest.approx(budget, abs=0.02)
    assert counted < 0.95


def test_before_anything_is_measured_an_estimate_is_uniform_and_meets_the_share() -> None:
    state = OfficialRouter(lambda block: random_weights(), BLOCKS).start(Setting(SCHEDULE))
    allotment = state.keep(outlook(0.75))
    assert allotment.tokens.unique().numel() == 1
    assert float(outlook(0.75).cost(allotment)) == pytest.approx(0.75, abs=1e-6)


def test_a_block_whose_logits_are_higher_keeps_more() -> None:
    state = OfficialRouter(lambda block: random_weights(), 2).start(Setting(SCHEDULE))
    for block, offset in enumerate((0.0, 1.0)):
        state.measured.put(block, torch.linspace(-2, 2, 200)[None] + offset)
    low, high = state.keep(outlook(0.8, blocks=2)).tokens.tolist()
    assert high - low == pytest.approx(0.25, abs=0.01)  # logits spread over 4, one block 1 higher


def test_quantiles_that_are_still_under_way_are_not_waited_for() -> None:
    class Event:
        done = False

        def query(self) -> bool:
            return self.done

    quantiles = Quantiles(1)
    quantiles._arrived = Event()
    quantiles.put(0, torch.arange(5.0)[None])
    assert quantiles.table() is None and quantiles.any
    quantiles._arrived.done = True
    assert quantiles.table().quantiles[0, 0, [0, -1]].tolist() == [0, 4]
    quantiles._arrived.done = False
    quantiles.put(0, torch.arange(9.0)[None])
    assert quantiles.table().quantiles[0, 0, -1] == 4  # the last that arrived
    state = OfficialRouter(lambda block: random_weights(), 1).start(Setting(SCHEDULE))
    state.measured._arrived = Event()
    state.measured.put(0, torch.arange(5.0)[None])
    assert state.keep(outlook(0.5)).tokens.tolist() == [1.0]


def test_the_released_mode_leaves_the_count_to_the_threshold() -> None:
    made = OfficialRouter(lambda block: random_weights(), 1)
    assert made.needs_history and not made.by_threshold().needs_history
    assert made.by_threshold().start(Setting(SCHEDULE)).keep(outlook(0.5)).tokens is None
    assert isinstance(made.start(Setting(SCHEDULE)).keep(outlook(0.9)), Allotment)


def moved_by_fixed_capacity(logits: Tensor) -> Tensor:
    """Fraction [blocks] of tokens that a capacity common to all rows decides otherwise than the threshold does.

    `logits` [blocks, rows, tokens] of one evaluation; the capacity is the mean over rows of what the threshold keeps.
    """
    chosen = logits > 0
    capacities = chosen.float().sum(-1).mean(-1).round().long()
    ranks = logits.argsort(-1, descending=True).argsort(-1)
    return ((ranks < capacities[:, None, None]) != chosen).float().mean((1, 2))


def test_what_a_fixed_capacity_moves() -> None:
    even = torch.tensor([[[3.0, 2, -1, -2], [1, -1, 5, -5]]])
    uneven = torch.tensor([[[3.0, 2, 1, -2], [-1, -3, 5, -5]]])  # 3 and 1 of 4 pass: with 2 each, one token of each row differs
    assert moved_by_fixed_capacity(torch.cat((even, uneven))).tolist() == [0.0, 0.25]
    assert isinstance(fold(random_weights(), torch.randn(1, 1, 16)), Folded)
