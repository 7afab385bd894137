"""The small Latte that ships and its adapter: what the files hold, what the gates decide, and which way things go in the videos."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit_core.budget import Plan
from dydit_core.checkpoints.adapter import Adapter, load_adapter
from dydit_core.checkpoints.dit import find_dit
from dydit_core.checkpoints.source import open_source
from dydit_core.demo.class_model import ClassModel, load_class_model
from dydit_core.demo.files import CLASS_VAE_FILE, LATTE_ADAPTER_FILE, LATTE_FILE, WEIGHTS
from dydit_core.demo.latte import LATTE, decode_videos
from dydit_core.demo.motion import CHANGED, moves_as_said
from dydit_core.demo.moving import NAMES, SIDE
from dydit_core.demo.scenes import TOKEN
from dydit_core.demo.vae import load_decoder
from dydit_core.methods import as_trained
from dydit_core.sampling import sample
from dydit_core.standalone import Budgeted

pytestmark = pytest.mark.skipif(not (WEIGHTS / LATTE_FILE).exists(), reason="the demo's weights are not in this checkout")

STEPS, CFG = 12, 2.0


@pytest.fixture(scope="module")
def drawn() -> ClassModel:
    return load_class_model(WEIGHTS / LATTE_FILE)


@pytest.fixture(scope="module")
def adapter() -> Adapter:
    return load_adapter(WEIGHTS / LATTE_ADAPTER_FILE)


def right(latents: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of the videos in which things go the way their classes say."""
    return float(moves_as_said(decode_videos(latents, load_decoder(WEIGHTS / CLASS_VAE_FILE)), labels).float().mean())


def test_the_files_say_what_they_are(adapter: Adapter) -> None:
    found = find_dit(open_source(WEIGHTS / LATTE_FILE))
    assert found.class_names == NAMES and found.config == LATTE and found.read_routers() is None
    assert adapter.router.low_rank is None and as_trained(adapter.router).needs_history
    assert sum((WEIGHTS / file).stat().st_size for file in (LATTE_FILE, LATTE_ADAPTER_FILE)) < 15_000_000


def test_dense_videos_move_as_their_class_says_and_not_as_another(drawn: ClassModel) -> None:
    labels = torch.arange(len(NAMES))
    latents, _ = drawn.draw(labels, STEPS, CFG)
    assert right(latents, labels) >= 0.9
    assert right(latents, labels.roll(1)) <= 0.3


@pytest.mark.parametrize("budget", [0.75, 0.6])
def test_budgets_hold_and_videos_go_on_moving(drawn: ClassModel, adapter: Adapter, budget: float) -> None:
    labels = torch.arange(0, len(NAMES), 2)
    latents, spent = drawn.draw(labels, STEPS, CFG, 0, as_trained(adapter.router), budget)
    assert spent == pytest.approx(budget, abs=0.02)
    assert right(latents, labels) >= 0.8


def test_what_moves_is_computed_more_often_than_what_rests(drawn: ClassModel, adapter: Adapter) -> None:
    """In four classes, of which each moves another way; the first evaluation, which computes everything, left out."""
    levels, none, decoder = drawn.schedule(8), (torch.tensor([len(NAMES)]),), load_decoder(WEIGHTS / CLASS_VAE_FILE)
    tokens = LATTE.frames, SIDE // TOKEN, SIDE // TOKEN
    for name in ("sailboat sails right", "balloon sinks", "sun rises", "clouds drift left"):
        noise = torch.randn(1, *LATTE.latent_size, generator=torch.Generator().manual_seed(0))
        with Budgeted(drawn.model, Plan(0.65), as_trained(adapter.router), levels) as budgeted:
            latents = sample(budgeted, (torch.tensor([NAMES.index(name)]),), noise, 8, CFG, none, levels)
        frames = decode_videos(latents, decoder)[0]
        change = (frames[1:] - frames[:-1]).abs().mean(1).unflatten(1, (-1, TOKEN)).unflatten(3, (-1, TOKEN)).amax((2, 4)) > CHANGED
        moves = torch.cat((change, change[-1:])) | torch.cat((change[:1], change))  # what is left and what is entered
        kept = torch.from_numpy(np.stack([evaluation.mask() for evaluation in budgeted.spent.evaluations[1:]])).float().mean((0, 1, 2)).view(tokens)
        assert kept[moves].mean() > 1.2 * kept[~moves].mean(), name
