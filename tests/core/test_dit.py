"""DiT blocks in parts: equal to the model's own forward at full capacity, to masks at less, and what is off costs nothing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from test_runtime import HALVES, difference
from test_width import WholeBackend
from torch import Tensor, nn
from toy import BACKEND, ScriptedRouter, count, counted_run, schedule
from toy_dit import BLOCKS, CONFIG, FAMILY, GROUPS, HEADS, TOKENS, DiTScene, reference, tiny_dit

from dydit_core import flops
from dydit_core.backend import TorchBackend
from dydit_core.budget import Plan
from dydit_core.families.known import FAMILIES, family_of
from dydit_core.models.dit import DiT, DiTConfig
from dydit_core.parts import Allotment, Gate, Geometry, Outlook, Setting, unchanged
from dydit_core.routers.change import ChangeRouter
from dydit_core.routers.learned import LearnedRouter
from dydit_core.routers.token import CapacityTable, TokenScores
from dydit_core.routers.width import new_width_scores, widths
from dydit_core.runtime import Method, Run
from dydit_core.sampling import eps_sigmas, sample, sigmas
from dydit_core.standalone import Budgeted
from dydit_core.substitutes.history import Reuse
from dydit_core.substitutes.nothing import Nothing
from dydit_core.td_lora import TimestepLoRA, new_low_rank

UNEVEN, ALL = [0.2, 1.0, 0.55], [1.0] * BLOCKS


def chosen(heads: bool = True, groups: bool = True) -> tuple[list, dict]:
    """Random widths of all blocks, as indices for us and as masks for the reference."""
    generator = torch.Generator().manual_seed(0)
    some = [torch.rand(BLOCKS, units, generator=generator) < 0.5 for units in (HEADS, GROUPS)]
    for mask, wanted in zip(some, (heads, groups)):
        mask[:, 1] = True
        mask |= not wanted
    return widths(*some), {block: (some[0][block], some[1][block]) for block in range(BLOCKS)}


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
def test_full_capacity_is_the_models_own_forward(stand_in: Nothing | Reuse) -> None:
    scene = DiTScene(rows=2)
    run = Run(Plan(1.0), Method(ScriptedRouter(ALL), stand_in), schedule(2))
    for sigma in schedule(2):
        assert difference(scene.evaluate(run, sigma), scene.blocks(*scene.embed(sigma))) < 1e-6
    assert run.ledger.achieved == 1.0


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
@pytest.mark.parametrize("share", [1.0, 1.6])
@pytest.mark.parametrize("backend", [BACKEND, WholeBackend()], ids=["cut", "whole"])
@pytest.mark.parametrize("keep, heads, groups", [(UNEVEN, False, False), (ALL, True, False), (ALL, False, True), (UNEVEN, True, True)],
                         ids=["tokens", "heads", "groups", "all three"])
def test_leaving_out_equals_masking(keep: list[float], heads: bool, groups: bool, backend: TorchBackend, share: float,
                                    stand_in: Nothing | Reuse) -> None:
    scene, (some, masks) = DiTScene(rows=4, branches=HALVES, backend=backend), chosen(heads, groups)
    router = ScriptedRouter(keep, stand_in.needs_history, some)
    _, outputs, trace = scene.run(Plan(0.5, min_keep=0.0, branch_share=share), Method(router, stand_in), schedule(3))
    history = {} if stand_in.needs_history else None
    for index, (sigma, output, evaluation) in enumerate(zip(schedule(3), outputs, trace)):
        computed = torch.from_numpy(evaluation.mask())
        full = stand_in.needs_history and index == 0
        assert difference(output, reference(scene.model, scene.embed(sigma), computed, history, {} if full else masks)) < 1e-5
    counts = computed.sum(2)
    assert (counts[:, 0] == counts[:, 1]).all() and (counts[0, 0] > counts[0, 3]) == (share > 1 and keep == UNEVEN)


class Threshold(ScriptedRouter):
    """Every token whose scripted score is above one half."""

    def keep(self, outlook: Outlook) -> Allotment:
        return Allotment(None, widths=self.widths)

    def scores(self, gate: Gate) -> Tensor:
        return super().scores(gate) - torch.linspace(0.1, 0.9, len(gate.image))[:, None]


@pytest.mark.parametrize("stand_in", [Nothing(), Reuse()], ids=["nothing", "reuse"])
def test_rows_that_keep_different_counts_share_one_product(stand_in: Nothing | Reuse) -> None:
    """Each row is as if it ran alone, and the batch costs what they cost together: nothing is padded."""
    scene, (some, masks) = DiTScene(rows=4), chosen()
    method = Method(Threshold(ALL, stand_in.needs_history, some), stand_in)
    _, outputs, trace = scene.run(Plan(0.5), method, schedule(3))
    history = {} if stand_in.needs_history else None
    for index, (sigma, output, evaluation) in enumerate(zip(schedule(3), outputs, trace)):
        computed = torch.from_numpy(evaluation.mask())
        full = stand_in.needs_history and index == 0
        assert difference(output, reference(scene.model, scene.embed(sigma), computed, history, {} if full else masks)) < 1e-5
    assert len(computed.sum(2)[0].unique()) == 4
    run, spent = counted_run(scene, Plan(0.5), Method(Threshold(ALL, widths=some), Nothing()), [1.0])
    assert spent == pytest.approx(run.ledger.achieved, rel=1e-6)


def test_skipped_tokens_see_no_layer_norm() -> None:
    scene, seen = DiTScene(rows=4), []
    for block in scene.model.blocks:
        block.norm2.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape))
    _, _, (evaluation,) = scene.run(Plan(0.5), Method(Threshold(ALL), Nothing()), [1.0])
    assert seen == [(1, kept, CONFIG.hidden_size) for kept in evaluation.mask().sum((1, 2))]


def test_cost_is_linear_in_the_batch() -> None:
    def spent(rows: int) -> float:
        scene = DiTScene(rows=rows)
        run = Run(Plan(0.5, min_keep=0.0), Method(ScriptedRouter(UNEVEN, widths=chosen()[0]), Nothing()), [1.0])
        run.arrive(1.0)
        entering = scene.embed(1.0)
        with scene.passing(run):
            return count(lambda: scene.blocks(*entering))

    assert spent(5) == 5 * spent(1)


def low_rank(seed: int = 0) -> TimestepLoRA:
    torch.manual_seed(seed)
    sizes = {(index, name): (layer.in_features, layer.out_features)
             for index, block in enumerate(FAMILY.blocks(tiny_dit())) for name, layer in FAMILY.layers(block).items()}
    added = new_low_rank(sizes, BLOCKS, rank=3, experts=2).requires_grad_(False)
    for up in added.up:
        up.normal_(0, 0.2)
    return added


@pytest.mark.parametrize("keep", [ALL, UNEVEN], ids=["all tokens", "some tokens"])
@pytest.mark.parametrize("backend, added", [(BACKEND, None), (BACKEND, low_rank()), (WholeBackend(), None)], ids=["cut", "low rank", "whole"])
def test_what_is_off_costs_nothing(keep: list[float], added: TimestepLoRA | None, backend: TorchBackend) -> None:
    """FLOPs that torch counts are those that are booked."""
    router = ScriptedRouter(keep, widths=chosen()[0])
    router.low_rank = added
    run, spent = counted_run(DiTScene(backend=backend), Plan(0.5, min_keep=0.0), Method(router, Nothing()), [1.0])
    assert spent == pytest.approx(run.ledger.achieved, rel=5e-3 if added else 1e-6)
    assert run.ledger.achieved < (0.95 if backend is BACKEND else 1.1)


def test_low_rank_additions_are_the_formula() -> None:
    scene, added, sigma = DiTScene(rows=2), low_rank(), 0.55
    router = ScriptedRouter(ALL)
    router.low_rank = added
    got = scene.evaluate(Run(Plan(0.5), Method(router, Nothing()), [sigma]), sigma)
    omega = torch.softmax(torch.lerp(added.mix[4], added.mix[5], 0.4), -1)
    entering = scene.embed(sigma)
    for (block, layer), down, up in zip(added.keys, added.down, added.up):
        scene.model.blocks[block].get_submodule(layer).weight.add_(torch.einsum("n,nor->or", omega[block], up) @ down[0])
    assert difference(got, scene.blocks(*entering)) < 1e-5


@pytest.mark.parametrize("prediction, sigma, level", [("flow", 0.6, 0.6), ("eps", 1.5, 0.6), ("eps", 157.4, 157.4 / 158.4)])
def test_gates_follow_the_noises_share(prediction: str, sigma: float, level: float) -> None:
    """DiT counts noise from 0 to 157 and SiT from 0 to 1: widths, TD-LoRA and what is spent early are the same for both."""
    model = tiny_dit(config=replace(CONFIG, prediction=prediction))
    scene, made, added = DiTScene(model=model), new_width_scores(BLOCKS, HEADS, GROUPS, knots=21, spread=1.0).requires_grad_(False), low_rank()
    made.groups.add_(torch.randn(21, BLOCKS, GROUPS, generator=torch.Generator().manual_seed(2)))
    added.mix.data = torch.randn(21, BLOCKS, 2, generator=torch.Generator().manual_seed(3))
    run = Run(Plan(0.6), Method(LearnedRouter(width=made, low_rank=added), Nothing()), [sigma])
    run.arrive(sigma)
    current = run.open(scene.costs, scene.geometry, scene.branches, 1, scene.grid, level=partial(FAMILY.level, model))
    logits = made(torch.tensor([level]))[1][0]
    for block in range(BLOCKS):
        groups = current.width(block).groups
        assert sorted(logits[block].topk(len(groups)).indices.tolist()) == groups.tolist()
    expected = added.at(added.weights(torch.tensor([level]))[:, 1], 1, "mlp.fc1")
    torch.testing.assert_close(current.low_rank(1, "mlp.fc1", torch.zeros(1)).up, expected.up[0], rtol=1e-4, atol=1e-5)
    sigmas = torch.tensor([sigma, sigma / 100], dtype=torch.float64)
    look = Outlook(sigmas, 0.6, 0, 0.0, 0.0, scene.costs, TOKENS, level=partial(FAMILY.level, model))
    same = replace(look, sigmas=FAMILY.level(model, sigmas), level=unchanged)
    ours, theirs = (ChangeRouter().start(Setting([])).keep(one).tokens for one in (look, same))
    assert torch.equal(ours, theirs) and float(look.cost(Allotment(ours))) > 0.61, "more is spent early"


@pytest.mark.parametrize("width, attention, mlp", [(384, 0.201326592, 0.301989888), (768, 0.704643072, 1.207959552), (1152, 1.50994944, 2.717908992)])
def test_costs_are_the_papers(width: int, attention: float, mlp: float) -> None:
    """Multiply-adds of one layer at 256 tokens, in G, as the authors' FLOPs loss has them; adaLN they do not count."""
    cost = flops.dit_block(Geometry(256, 0, width), 256)
    assert (cost.heads / 2e9, 256 * cost.token_groups / 2e9) == pytest.approx((attention, mlp))
    assert cost.fixed == 12 * width**2 and cost.token == cost.token_heads == cost.groups == 0


@pytest.mark.parametrize("keep, budget", [(0.84, 0.9), (0.61, 0.75), (0.22, 0.5), (0.0, 0.36)])
def test_what_budgets_mean_on_xl(keep: float, budget: float) -> None:
    cost = flops.dit_block(Geometry(256, 0, 1152), 256)
    assert cost.at(256 * keep) / cost.at(256) == pytest.approx(budget, abs=0.005)


def gaussian_router(with_widths: bool) -> LearnedRouter:
    """An adapter's router for a model without text, and the table of gaussian logits around each bias."""
    torch.manual_seed(3)
    scores = TokenScores(BLOCKS, CONFIG.hidden_size, rank=4, text=False).requires_grad_(False)
    scores.bias.copy_(torch.linspace(-1.0, 1.0, BLOCKS))
    quantiles = torch.special.ndtri(torch.linspace(0, 1, 33).clamp(1e-3, 1 - 1e-3)) + scores.bias[:, None, None]
    made = new_width_scores(BLOCKS, HEADS, 32, spread=1.0).requires_grad_(False) if with_widths else None
    return LearnedRouter(scores, CapacityTable(quantiles.expand(-1, 4, -1), torch.linspace(0.25, 1, 4)), made)


@pytest.mark.parametrize("budget", [0.9, 0.75, 0.65])
@pytest.mark.parametrize("kind", ["tokens", "tokens and widths", "changed tokens"])
def test_a_budget_is_met(kind: str, budget: float) -> None:
    method = Method(ChangeRouter(), Reuse()) if kind == "changed tokens" else Method(gaussian_router("widths" in kind), Nothing())
    run, spent = counted_run(DiTScene(rows=2), Plan(budget), method, schedule(8))
    assert spent == pytest.approx(run.ledger.achieved, rel=2e-3)
    assert spent == pytest.approx(budget, rel=0.02)


def test_scores_without_text_have_no_text_term() -> None:
    with_text, without = (TokenScores(2, 96, 4, text=text) for text in (True, False))
    assert "text" in with_text.state_dict() and "text" not in without.state_dict()
    assert with_text.flops(7) - without.flops(7) == 2 * 96
    assert without.copy_to(torch.device("cpu")).text is None
    without.load_state_dict({key: value for key, value in with_text.state_dict().items() if key != "text"})
    image, text, condition = torch.randn(2, 7, 96), torch.randn(2, 5, 96), torch.randn(2, 96)
    seen = Gate(0, 0.5, image, condition, lambda: image, text, lambda: text)
    torch.testing.assert_close(with_text(seen), without(Gate(0, 0.5, image, condition, lambda: image)))  # a new one gives text no weight


def test_a_layer_norm_that_no_router_looks_at_is_not_computed() -> None:
    asked = []
    gate = Gate(0, 0.5, torch.zeros(1, 2, 3), torch.zeros(1, 3), lambda: asked.append(1) or torch.ones(1, 2, 3))
    assert not asked and gate.normed is gate.normed and asked == [1] and gate.normed_text is None


def test_a_model_finds_its_family_or_hears_why_not() -> None:
    from toy import tiny_flux
    assert [family_of(model).name for model in (tiny_flux(), tiny_dit())] == ["FLUX", "DiT"] and len(FAMILIES) == 3
    with pytest.raises(ValueError, match=r"^Linear is none of FLUX, Latte, DiT$"):
        family_of(nn.Linear(2, 2))
    relative = tiny_dit()
    del relative.blocks[1].mlp.fc2
    assert FAMILY.refusal(relative) == "DiT is a DiT relative whose blocks lack mlp.fc2"
    stranger = tiny_dit()
    del stranger.y_embedder
    with pytest.raises(ValueError, match=r"^DiT has blocks but is no class-conditional DiT \(it lacks y_embedder\)$"):
        family_of(stranger)


# --- without a host

@pytest.mark.parametrize("prediction", ["eps", "flow"])
def test_a_dit_samples_under_a_budget(prediction: str) -> None:
    config = DiTConfig(hidden_size=32, depth=3, num_heads=4, side=16, classes=5, prediction=prediction)
    model, labels, none = tiny_dit(config=config), torch.tensor([1, 4]), torch.tensor([config.classes])
    levels = eps_sigmas(6) if prediction == "eps" else sigmas(6)
    noise = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * levels[0]
    seen = []
    with Budgeted(model, Plan(0.7), Method(ChangeRouter(), Reuse()), levels, seen.append) as budgeted:
        found = sample(budgeted, (labels,), noise, cfg=2.0, uncond=(none,), schedule=levels)
    dense = sample(model.denoise_direction, (labels,), noise, cfg=2.0, uncond=(none,), schedule=levels)
    assert budgeted.spent.achieved == pytest.approx(0.7, rel=0.02) and len(seen) == 6
    assert 0 < difference(found, dense) < 1
    with Budgeted(model, Plan(1.0), Method(LearnedRouter(), Nothing()), levels) as open_:
        assert difference(sample(open_, (labels,), noise, cfg=2.0, uncond=(none,), schedule=levels), dense) < 1e-5


def test_eps_noise_levels() -> None:
    """Of evenly spaced timesteps, and each is the network's own timestep."""
    from dydit_core.models.dit import timestep
    levels = eps_sigmas(4)
    assert levels[0] == pytest.approx(157.4, abs=0.1) and levels[-1] == 0
    assert timestep(torch.tensor(levels[:-1]), "eps").tolist() == [999, 749, 499, 249]


def test_euler_along_the_direction_of_an_eps_model_is_exact_for_one_picture() -> None:
    """A network that knows the noise: x − sigma · noise is the picture at every level."""
    picture, noise, levels = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 16, 16), eps_sigmas(5)

    class Knows(DiT):
        def forward(self, x: Tensor, time: Tensor, labels: Tensor, transformer_options: dict | None = None) -> Tensor:
            return torch.cat((noise, torch.full_like(noise, 9.0)), 1)

    model = Knows(DiTConfig(hidden_size=32, depth=1, num_heads=4, side=16, classes=5))
    found = sample(model.denoise_direction, (torch.tensor([0]),), picture + levels[0] * noise, schedule=levels)
    torch.testing.assert_close(found, picture, rtol=0, atol=1e-4)
