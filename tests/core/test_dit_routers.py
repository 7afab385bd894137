"""The authors' routers for DiT: equal to their classes on recorded numbers, and at any budget."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_runtime import HALVES, difference
from torch import Tensor
from toy import count, counted_run, schedule
from toy_dit import BLOCKS, CONFIG, FAMILY, GROUPS, HEADS, TOKENS, DiTScene, reference, routers, tiny_dit

from dydit_core import layouts
from dydit_core.backend import TorchBackend
from dydit_core.budget import Plan, forecast
from dydit_core.methods import AUTO, CHECKPOINT, LEARNED, resolve
from dydit_core.models.dit import DiT, DiTConfig, eps_log_sigmas
from dydit_core.parts import Extent, Gate, Outlook, Setting
from dydit_core.recorder import Recorder
from dydit_core.routers.dit import DiTRouters, Linears, TokenMLP
from dydit_core.routers.token import CapacityTable
from dydit_core.runtime import Branches, Method, Run, running
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing
from dydit_core.trace import Evaluation
from dydit_core.train.gates import Gates, TrainingPass
from dydit_core.train.teacher import Teacher

FIXTURE = Path(__file__).parents[1] / "fixtures/dit_official.safetensors"
RECORDED = DiTConfig(hidden_size=64, depth=3, num_heads=4, side=8, classes=10)
ROWS = 3


@cache
def recorded() -> dict[str, Tensor]:
    return load_file(FIXTURE)


def part(prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value.float() for key, value in recorded().items() if key.startswith(prefix)}


def model_of(prediction: str) -> DiT:
    model = DiT(replace(RECORDED, prediction=prediction))
    model.load_state_dict(part("base."))
    return model.requires_grad_(False)


def routers_of(name: str) -> DiTRouters:
    found = part(f"{name}.routers.")

    def stacked(key: str) -> Tensor:
        return torch.stack([found[f"blocks.{block}.{key}"] for block in range(RECORDED.depth)])

    heads, groups = (Linears(stacked(f"{kind}.router.weight"), stacked(f"{kind}.router.bias")) for kind in ("attn_rate", "mlp_rate"))
    mlp = [stacked(f"token_selection.mlp_head.{key}") for key in ("0.weight", "0.bias", "2.weight", "2.bias")]
    return DiTRouters(heads, groups, TokenMLP(*mlp[:2], mlp[2][:, 0], mlp[3][:, 0]), 4, 4)


def test_the_fixture_is_small_and_says_where_it_is_from() -> None:
    with safe_open(FIXTURE, framework="pt") as file:
        words = file.metadata()["source"]
    for source in ("alibaba-damo-academy/DyDiT commit 0ddc5097", "DyDiT- commit dd68c477", "facebookresearch/DiT commit ed81ce22", "willisma/SiT commit 947f95bd"):
        assert source in words
    assert FIXTURE.stat().st_size < 1_000_000
    for name, less in (("march", 1), ("december", 0)):
        assert routers_of(name).heads.bias.shape[1] == 4 - less
        for time in (900, 300):
            fractions = [recorded()[f"{name}.{time}.{kind}"].float().mean(-1) for kind in ("heads", "groups", "tokens")]
            assert all(0.2 <= of.min() and of.max() <= 0.8 for of in fractions)
            assert len(recorded()[f"{name}.{time}.tokens"].sum(2).unique()) > 1


@pytest.mark.parametrize("name", ["march", "december"])
def test_masks_and_outputs_are_the_authors(name: str) -> None:
    """At two timesteps of one schedule, sliced and gathered."""
    model, recorder, labels = model_of("eps"), Recorder(), recorded()["input.labels"]
    levels = [float(eps_log_sigmas()[time].exp()) for time in (900, 300)]
    run = Run(Plan(0.5), Method(routers_of(name).by_threshold(), Nothing()), levels, recorder)
    for time, sigma in zip((900, 300), levels):
        run.arrive(sigma)
        with running(run, FAMILY, model, FAMILY.geometry(model, 16), Branches.cond_only(ROWS), ROWS, (4, 4), TorchBackend()):
            out = model(recorded()["input.x"], torch.full((ROWS,), float(time)), labels)
        assert (out - recorded()[f"{name}.{time}.output"]).abs().max() < 1e-5
    run.finish()
    for time, evaluation in zip((900, 300), recorder.finish()):
        for kind, mask in (("tokens", evaluation.mask()), ("heads", evaluation.heads.values()), ("groups", evaluation.groups.values())):
            assert np.array_equal(mask, recorded()[f"{name}.{time}.{kind}"].numpy()), kind
    assert run.ledger.achieved < 0.75


@pytest.mark.parametrize("name, time, prediction", [("dit", 900, "eps"), ("sit", 0.2, "flow")])
def test_without_routers_it_is_the_authors_model(name: str, time: float, prediction: str) -> None:
    expected = recorded()[f"{name}.{time}.output"]
    out = model_of(prediction)(recorded()["input.x"], torch.full((ROWS,), float(time)), recorded()["input.labels"])
    assert (out[:, : expected.shape[1]] - expected).abs().max() < 1e-5


# --- widths

def test_unit_0_is_always_on_where_no_output_decides_it() -> None:
    some = Linears(torch.zeros(2, 3, 5), torch.tensor([[-1.0, 2, -3], [-1, -1, -1]]))
    logits = some(torch.randn(4, 5), 4)
    assert logits.shape == (4, 2, 4) and logits[0].tolist() == [[torch.inf, -1, 2, -3], [torch.inf, -1, -1, -1]]
    assert torch.equal(some(torch.randn(4, 5), 3)[0], some.bias)


@pytest.mark.parametrize("always_on, expected", [(True, [0]), (False, [2])])
def test_one_unit_stays_on(always_on: bool, expected: list[int]) -> None:
    bias = torch.tensor([-5.0, -4.0, -1.0, -2.0])[int(always_on):].expand(BLOCKS, -1)
    shut = Linears(torch.zeros(BLOCKS, 4 - always_on, 32), bias)
    state = DiTRouters(shut, None, None, 4, GROUPS).by_threshold().start(Setting([0.5], embedding))
    width = state.keep(outlook(0.5)).widths[0]
    assert width.heads.tolist() == expected and width.groups is None


def embedding(sigmas: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.stack([torch.sin(3 * sigmas * k + k) for k in range(CONFIG.hidden_size)], -1).to(dtype)


def outlook(share: float, sigmas: tuple[float, ...] = (0.5, 0.25)) -> Outlook:
    scene = DiTScene()
    return Outlook(torch.tensor(sigmas, dtype=torch.float64), share, 0, 0.0, 0.0, scene.costs, TOKENS)


def test_the_widths_of_a_schedule_are_decided_once() -> None:
    asked = []
    made = routers().by_threshold()
    state = made.start(Setting([1.0, 0.5, 0.25], lambda sigmas, dtype: asked.append(sigmas.tolist()) or embedding(sigmas, dtype)))
    found = [state.keep(outlook(0.5, (sigma,))).widths for sigma in (1.0, 0.5, 0.25, 0.5)]
    assert asked == [[1.0, 0.5, 0.25]]
    between = state.keep(outlook(0.5, (0.375,))).widths
    assert str(state.keep(outlook(0.5, (0.375 + 1e-9,))).widths) == str(between)
    assert len(asked) == 2 and asked[1] == [0.375], "between two steps they are decided as exactly"
    assert str(found[1]) == str(found[3]) != str(found[0])
    for sigma, widths_ in ((1.0, found[0]), (0.375, between)):
        for block, width in enumerate(widths_):
            e = embedding(torch.tensor([sigma]), torch.float32)[0]
            for linears, kept in ((made.heads, width.heads), (made.groups, width.groups)):
                on = [0, *(1 + (linears.weight[block] @ e + linears.bias[block] > 0).nonzero()[:, 0]).tolist()]
                assert (list(range(len(linears.bias[0]) + 1)) if kept is None else kept.tolist()) == on


def test_weights_are_cut_once_for_each_noise_level(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where cond and uncond come one after the other, and where a sampler evaluates a noise level twice."""
    cuts = []
    monkeypatch.setattr(layouts, "_cut", lambda *args, cut=layouts._cut: cuts.append(args[4] is not None) or cut(*args))
    one, other = (DiTScene(branches=Branches((key,), *slices)) for key, *slices in (("cond", slice(0, 1), slice(1, 1)), ("uncond", slice(0, 0), slice(0, 1))))
    other.model = one.model
    run = Run(Plan(0.5), Method(routers().by_threshold(), Nothing()), schedule(3))
    made = []
    for sigma in (1.0, 2 / 3, 2 / 3, 1 / 3):
        cuts.clear()
        for scene in (one, other):
            scene.evaluate(run, sigma)
        made.append(sum(cuts))
    assert made[0] > 6 and made[1] > 0 and made[2] == 0, "what is one run of channels is a view, the rest a copy"


def test_what_a_run_holds() -> None:
    made, x = routers(), torch.zeros(1, TOKENS, CONFIG.hidden_size, dtype=torch.bfloat16)
    extent = Extent(DiTScene().geometry, BLOCKS, 4, 1, element_size=2, weights=1000)
    held = sum(part.nbytes for part in made.tokens.placed(x).parameters())
    assert made.run_bytes(extent) == held + 1000 and made.row_bytes(extent) == 0
    assert replace(made, heads=None, groups=None).run_bytes(extent) == held and replace(made, tokens=None).run_bytes(extent) == 1000


def test_the_timestep_embedding_is_the_models_without_the_class() -> None:
    model = tiny_dit()
    sigmas = torch.tensor([0.8, 0.3])
    assert torch.equal(FAMILY.time_embedding(model, TorchBackend(), sigmas, torch.float32), model.t_embedder(1 - sigmas, torch.float32))
    half = FAMILY.time_embedding(model.bfloat16(), TorchBackend(), sigmas, torch.float32)
    assert half.dtype == torch.bfloat16, "in the type of the embedder's weights"


def test_the_timestep_embedding_is_computed_where_the_products_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host may keep the weights elsewhere, and fetch them."""
    class Far(TorchBackend):
        def device(self, linear: torch.nn.Module) -> torch.device:
            return torch.device("meta")

    model = tiny_dit()
    monkeypatch.setattr(model, "embed_time", lambda time, dtype: time)
    assert FAMILY.time_embedding(model, Far(), torch.tensor([0.8]), torch.float32).device.type == "meta"


# --- tokens

def test_token_logits_are_the_formula() -> None:
    made = routers()
    x = torch.randn(2, 7, CONFIG.hidden_size)
    for block in range(BLOCKS):
        logits = made.start(Setting([1.0])).scores(Gate(block, 0.5, x, x[:, 0], lambda: pytest.fail("the residual is taken as it is")))
        mlp = made.tokens.requires_grad_(False)
        for row in range(2):
            for token in range(7):
                hidden = (mlp.down[block] @ x[row, token] + mlp.down_bias[block]).clamp(min=0)
                assert float(logits[row, token]) == pytest.approx(float(mlp.up[block] @ hidden + mlp.up_bias[block]), abs=1e-5)


def test_routers_flops_are_counted_and_the_files_weights_stay_where_they_are() -> None:
    made, x = routers(), torch.randn(3, TOKENS, CONFIG.hidden_size)
    state, seen = made.start(Setting([1.0])), Gate(1, 0.5, x, x[:, 0], lambda: x)
    counted = count(lambda: state.scores(seen))  # torch counts no product with a single vector, here one in 33
    assert counted == pytest.approx(3 * made.flops(DiTScene().geometry) * 32 / 33)
    away = x.to("meta", torch.bfloat16)
    state.measured = None
    assert state.scores(Gate(1, 0.5, away, away[:, 0], lambda: away)).device.type == "meta"
    assert made.tokens.down.device.type == "cpu" and made.tokens.down.dtype == torch.float32


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
def test_leaving_out_equals_masking_at_a_budget(stand_in: Nothing | Reuse) -> None:
    scene = DiTScene(rows=4, branches=HALVES)
    _, outputs, trace = scene.run(Plan(0.6, branch_share=1.5), Method(routers(), stand_in), schedule(4))
    history = {} if stand_in.needs_history else None
    for sigma, output, evaluation in zip(schedule(4), outputs, trace):
        assert difference(output, reference(scene.model, scene.embed(sigma), torch.from_numpy(evaluation.mask()), history, masks_of(evaluation))) < 1e-5
    assert trace[0].mask().all() and trace[0].heads.values().all()
    assert not trace[-1].mask().all() and not trace[-1].heads.values().all() and not trace[-1].groups.values().all()


def masks_of(evaluation: Evaluation) -> dict[int, tuple[Tensor, Tensor]]:
    heads, groups = torch.from_numpy(evaluation.heads.values()), torch.from_numpy(evaluation.groups.values())
    return {block: (heads[block], groups[block]) for block in range(BLOCKS)}


def table(levels: int = 33) -> CapacityTable:
    """Of the logits that the random routers give in a dense run, in one bin."""
    scene, logits = DiTScene(rows=4), [[] for _ in range(BLOCKS)]
    made = routers()

    class Watched(Nothing):
        def start(self) -> Watched:
            return self

        def update(self, block: int, residual: Tensor, gate: Tensor, kept: None, values: Tensor) -> Tensor:
            logits[block].append(made.tokens(Gate(block, 0.0, residual, gate, lambda: residual)).detach().flatten())
            return torch.addcmul(residual, gate, values)

    scene.run(Plan(1.0), Method(replace(made, heads=None, groups=None, tokens=None), Watched()), schedule(4))
    quantiles = torch.stack([torch.cat(of).quantile(torch.linspace(0, 1, levels)) for of in logits])
    return CapacityTable(quantiles[:, None], torch.ones(1))


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.6])
@pytest.mark.parametrize("kind", ["measured", "table", "december", "tokens", "widths"])
def test_a_budget_is_met(kind: str, budget: float) -> None:
    """Counted FLOPs, of the routers too, are what is booked and what was asked."""
    made = {"measured": routers(), "table": replace(routers(), table=table()), "december": routers(always_on=False),
            "tokens": replace(routers(), heads=None, groups=None), "widths": replace(routers(), tokens=None)}[kind]
    run, spent = counted_run(DiTScene(rows=2), Plan(budget), Method(made, Nothing()), schedule(12))
    assert spent == pytest.approx(run.ledger.achieved, rel=1e-3)
    # Of 4 heads and 8 groups in 3 blocks one is much; tokens make up for it where there are any.
    assert spent == pytest.approx(budget, rel=0.03 if kind == "widths" else 0.02)
    assert (run.ledger.spent[0] > 0.99) == (kind in ("measured", "december", "tokens"))


@pytest.mark.parametrize("rows", [1, 4])
def test_four_steps_of_calibrated_routers_meet_a_budget(rows: int) -> None:
    """Counted FLOPs; what is forecast before; and the first evaluation is routed, tokens and widths."""
    made, scene, plan = replace(routers(), table=table()), DiTScene(rows=rows), Plan(0.6)
    run, spent = counted_run(scene, plan, Method(made, Nothing()), schedule(4))
    assert spent == pytest.approx(0.6, rel=0.02) and run.ledger.spent[0] < 0.8
    told = forecast(plan, made, schedule(4), scene.costs, TOKENS, Method(made, Nothing()).needs_history, run.overhead(scene.costs, scene.geometry))
    assert told == pytest.approx(0.6, rel=0.02)
    first = DiTScene(rows=rows).run(plan, Method(made, Nothing()), schedule(4))[2][0]
    assert not first.mask().all() and not first.heads.values().all() and not first.groups.values().all()
    late = counted_run(scene, Plan(0.6, start_sigma=0.8), Method(made, Nothing()), schedule(4))[0].ledger.spent
    assert late[0] == 1.0 and max(late[1:]) < 0.75 and sum(late) == pytest.approx(4 * 0.6, rel=0.02), "outside the window it is dense still"


def test_below_the_floor_it_runs_at_the_floor_and_says_so_before() -> None:
    scene, plan = DiTScene(), Plan(0.05)
    run, spent = counted_run(scene, plan, Method(replace(routers(), table=table()), Nothing()), schedule(8))
    overhead = run.overhead(scene.costs, scene.geometry)
    told = forecast(plan, replace(routers(), table=table()), schedule(8), scene.costs, TOKENS, False, overhead)
    assert spent == pytest.approx(told, rel=0.01) and spent > 0.1
    least = sum(cost.at(7, 1 / HEADS, 1 / GROUPS) for cost in scene.costs) / sum(cost.at(TOKENS) for cost in scene.costs)
    assert spent == pytest.approx(least + overhead, rel=0.01)  # a tenth of the tokens, one head, one group


def test_all_gates_move_along_one_shift() -> None:
    state = replace(routers(), table=table()).start(Setting([0.5, 0.25], embedding))
    allotments = [state.keep(outlook(share)) for share in (0.9, 0.75, 0.6, 0.45)]
    for more, less in zip(allotments, allotments[1:]):
        assert (less.tokens <= more.tokens).all() and less.tokens.sum() < more.tokens.sum()
        for many, few in zip(more.widths, less.widths):
            assert on(few.groups, GROUPS) <= on(many.groups, GROUPS) and on(few.heads, HEADS) <= on(many.heads, HEADS)
    assert allotments[2].tokens.unique().numel() == BLOCKS, "never the same capacity in every block"


def on(units: Tensor | None, every: int) -> set[int]:
    return set(range(every) if units is None else units.tolist())


def test_before_anything_is_known_an_estimate_meets_the_share() -> None:
    plan, scene = Plan(0.6), DiTScene()
    assert forecast(plan, routers(), schedule(8), scene.costs, TOKENS, True) == pytest.approx(0.6, rel=0.02)
    assert forecast(plan, routers().by_threshold(), schedule(8), scene.costs, TOKENS, False) is None


def test_the_files_threshold_ignores_the_budget() -> None:
    scene = DiTScene(rows=3)
    found = [scene.run(Plan(budget), Method(routers().by_threshold(), Nothing()), schedule(3)) for budget in (0.3, 0.9)]
    assert torch.equal(found[0][1][-1], found[1][1][-1])
    counts = found[0][2][0].mask().sum(2)
    assert (np.ptp(counts, axis=1) > 0).any(), "the counts follow each picture"
    run, spent = counted_run(scene, Plan(0.3), Method(routers().by_threshold(), Nothing()), schedule(3))
    assert spent == pytest.approx(run.ledger.achieved, rel=1e-3)


def test_rows_are_split_and_joined() -> None:
    state = routers().start(Setting([1.0], embedding))
    x = torch.randn(2, TOKENS, CONFIG.hidden_size)
    scores = state.scores(Gate(0, 1.0, x, x[:, 0], lambda: x))
    parts = [state.rows(slice(row, row + 1)) for row in range(2)]
    for row, one in enumerate(parts):
        assert torch.equal(one.measured.table().quantiles, state.measured.table().quantiles)
        torch.testing.assert_close(one.scores(Gate(0, 1.0, x[[row]], x[[row], 0], lambda: x)), scores[[row]])
    assert not torch.equal(parts[0].measured.table().quantiles, parts[1].measured.table().quantiles)
    assert parts[0].joined(parts[1:]) is parts[0]


def test_methods_of_released_routers() -> None:
    made = routers()
    assert resolve(AUTO, AUTO, made) == (LEARNED, "nothing", Method(made, Nothing()))
    assert resolve(LEARNED, "reuse", made) == (LEARNED, "reuse", Method(made, Reuse()))
    own = resolve(CHECKPOINT, AUTO, made)[2].router
    assert own.thresholded and not own.needs_history and made.needs_history and not replace(made, table=table()).needs_history
    assert own.heads is made.heads and own.tokens is made.tokens


def test_the_routers_train_in_the_pass_that_trains_an_adapter() -> None:
    """At their own threshold a training pass multiplies by what the engine leaves out; gradients reach every router."""
    scene, made, sigma = DiTScene(rows=2), routers(), 0.5
    expected = scene.evaluate(Run(Plan(0.5), Method(made.by_threshold(), Nothing()), [sigma]), sigma)

    class Widths(torch.nn.Module):
        def forward(self, sigmas: Tensor) -> tuple[Tensor, Tensor]:
            return made.unit_logits(FAMILY.time_embedding(scene.model, TorchBackend(), sigmas, torch.float32))

    def velocity(x: Tensor, sigmas: Tensor, *rest: Tensor) -> Tensor:
        return scene.blocks(*scene.embed(sigma))

    current = TrainingPass(Gates(made.tokens, Widths()), 0, torch.full((2,), sigma))
    teacher = Teacher(scene.model, FAMILY, TorchBackend(), velocity, schedule)
    out = teacher.gated(current, torch.zeros(2, 4, 16, 16), torch.full((2,), sigma), scene.labels)
    assert difference(out.detach(), expected) < 1e-5
    (out.square().mean() + current.cost(scene.costs).mean()).backward()
    for name, parameter in (*made.heads.named_parameters(), *made.groups.named_parameters(), *made.tokens.named_parameters()):
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name
