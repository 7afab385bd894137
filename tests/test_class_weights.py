"""The small DyDiT and DySiT that ship: what their routers decide, and what is left of the pictures."""

from __future__ import annotations

import pytest
import torch

from dydit_core.bench.dit_routers import rates_of
from dydit_core.budget import Plan
from dydit_core.checkpoints.dit import find_dit
from dydit_core.checkpoints.source import open_source
from dydit_core.demo.checker import load_checker
from dydit_core.demo.class_model import ClassModel, load_class_model
from dydit_core.demo.classes import NAMES, recognized
from dydit_core.demo.files import CHECKER_FILE, CLASS_VAE_FILE, WEIGHTS, class_file
from dydit_core.demo.vae import decode, load_decoder
from dydit_core.runtime import Method
from dydit_core.sampling import sample
from dydit_core.standalone import Budgeted
from dydit_core.substitutes.nothing import Nothing

pytestmark = pytest.mark.skipif(not (WEIGHTS / CLASS_VAE_FILE).exists(), reason="the demo's weights are not in this checkout")


@pytest.fixture(scope="module", params=["dit", "sit"])
def drawn(request: pytest.FixtureRequest) -> ClassModel:
    return load_class_model(WEIGHTS / class_file(request.param))


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_the_files_say_what_they_are(name: str) -> None:
    found = find_dit(open_source(WEIGHTS / class_file(name)))
    assert found.class_names == NAMES and found.config.prediction == {"dit": "eps", "sit": "flow"}[name]
    sizes = [(WEIGHTS / file).stat().st_size for file in (class_file(name), CLASS_VAE_FILE)]
    assert sum(sizes) < 15_000_000


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_tokens_heads_and_channels_are_all_skipped(name: str) -> None:
    """And no kind of gate pays all of what is saved."""
    rates = rates_of(WEIGHTS / class_file(name), steps=8, rows=2)
    for part in (rates.heads, rates.groups, rates.tokens):
        assert part.min() < 0.7 and 0.3 < part.mean() < 0.9


@pytest.mark.parametrize("budget", [0.75, 0.5, 0.3])
def test_a_budget_holds_from_the_first_evaluation_on(drawn: ClassModel, budget: float) -> None:
    config, levels = drawn.model.config, drawn.schedule(6)
    noise = levels[0] * torch.randn(2, *config.latent_size, generator=torch.Generator().manual_seed(0))
    with Budgeted(drawn.model, Plan(budget), Method(drawn.routers, Nothing()), levels) as budgeted:
        sample(budgeted, (torch.tensor([8, 11]),), noise, 6, schedule=levels)
    first, *_ = budgeted.spent.evaluations
    assert first.flops < 0.9 and not first.mask().all()
    assert budgeted.spent.achieved == pytest.approx(budget, abs=0.02)


def test_pictures_keep_their_class_at_half_the_compute(drawn: ClassModel) -> None:
    """Classes that the small models draw well; nothing in place of what is skipped."""
    labels = torch.tensor([NAMES.index(name) for name in ("village", "regatta", "moonlit night")]).repeat(2)
    latents, spent = drawn.draw(labels, 12, 3.0, 0, Method(drawn.routers, Nothing()), 0.5)
    assert spent == pytest.approx(0.5, abs=0.02)
    images, checker = decode(latents, load_decoder(WEIGHTS / CLASS_VAE_FILE)), load_checker(WEIGHTS / CHECKER_FILE)
    assert recognized(images, labels, checker).float().mean() >= 0.5
    assert not recognized(images, labels.roll(1), checker).any()
