from pathlib import Path

import torch
from torch import Tensor

from dydit_core.models.flux import Flux, FluxConfig
from dydit_core.train.base import Run, Stage, load, new_run, share, train
from dydit_core.train.flow import FluxFlow, init_flux
from dydit_core.train.muon import orthogonalize
from dydit_core.train.team import Team, together

CONFIG = FluxConfig(hidden_size=32, depth=1, depth_single_blocks=1, in_channels=4, context_in_dim=6, vec_in_dim=5,
                    axes_dim=(4, 6, 6))
PLAN = (Stage("windows", 2, batch=4, window=2, start=1e-2, end=1e-2), Stage("full", 2, 4, 4, 1e-2, 1e-3))


class Toy:
    """Eight fixed rows."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = ((8, 4, 8, 8), (8, 3, 6), (8, 5))
        self.tensors = [torch.randn(shape, generator=generator).share_memory_() for shape in shapes]

    def __len__(self) -> int:
        return 8

    def batch(self, index: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        latents, context, pooled = (tensor[index] for tensor in self.tensors)
        return latents, context, pooled


def fresh() -> Run:
    torch.manual_seed(0)
    return new_run(init_flux(Flux(CONFIG)))


def objective() -> FluxFlow:
    return FluxFlow(Toy(), (torch.zeros(1, 3, 6), torch.zeros(1, 5)))


def quiet(line: str) -> None:
    pass


def member(team: Team, run: Run, checkpoint: Path) -> None:
    train(run, objective(), PLAN, checkpoint, quiet, team=team)


def test_resumed_training_is_bit_identical_to_uninterrupted(tmp_path: Path) -> None:
    whole = fresh()
    train(whole, objective(), PLAN, tmp_path / "whole.pt", quiet)
    train(fresh(), objective(), PLAN[:1], tmp_path / "part.pt", quiet)
    resumed = fresh()
    load(resumed, tmp_path / "part.pt")
    assert resumed.step == 2
    train(resumed, objective(), PLAN, tmp_path / "part.pt", quiet)
    assert resumed.losses == whole.losses and len(whole.losses) == 4
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name
        assert torch.equal(whole.ema[name], resumed.ema[name]), name


def test_the_end_of_every_stage_is_kept(tmp_path: Path) -> None:
    train(fresh(), objective(), PLAN, tmp_path / "base.pt", quiet)
    assert torch.load(tmp_path / "base_windows.pt", weights_only=True)["step"] == 2
    assert torch.load(tmp_path / "base_full.pt", weights_only=True)["step"] == 4


def test_a_team_of_two_takes_the_steps_of_one(tmp_path: Path) -> None:
    losses = []
    for size in (1, 2):
        run = fresh()
        share(run)
        numbers = sum(param.numel() for param in run.model.parameters())
        together(member, size, numbers, run, tmp_path / f"{size}.pt")
        losses.append(torch.tensor(torch.load(tmp_path / f"{size}.pt", weights_only=True)["losses"]))
    assert torch.allclose(losses[0], losses[1], rtol=1e-4)


def test_orthogonalized_matrices_have_singular_values_near_one() -> None:
    for shape in ((24, 64), (64, 24)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape, generator=torch.Generator().manual_seed(0))))
        assert values.min() > 0.6 and values.max() < 1.3
