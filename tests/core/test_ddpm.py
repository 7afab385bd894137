"""The DiT paper's sampler against numbers recorded from its code (see the fixture's metadata)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dydit_core.ddpm import chain, guided, sample, spaced
from dydit_core.models.dit import DiT, DiTConfig

OFFICIAL = load_file(Path(__file__).parents[1] / "fixtures" / "ddpm_official.safetensors")


@pytest.mark.parametrize("steps", [7, 50, 250, 1000])
def test_timesteps_are_the_originals(steps: int) -> None:
    assert spaced(steps) == OFFICIAL[f"timesteps.{steps}"].tolist()


@pytest.mark.parametrize("steps", [1, 1001])
def test_steps_that_cannot_be_spaced(steps: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 1000 steps, not {steps}"):
        spaced(steps)


@pytest.mark.parametrize("row", range(6))
def test_a_step_is_the_originals(row: int) -> None:
    index, time = int(OFFICIAL["step.index"][row]), int(OFFICIAL["step.timestep"][row])
    x, output, noise, after, log_variance = (OFFICIAL[f"step.{name}"][row:row + 1]
                                             for name in ("x", "output", "noise", "sample", "log_variance"))
    along = chain(250)
    assert along.timesteps[index] == time
    torch.testing.assert_close(along.log_variance(output[:, 4:], index), log_variance, rtol=1e-6, atol=1e-6)
    # At the last timesteps the picture is what is left of numbers a hundred times as large.
    torch.testing.assert_close(along.step(x, output, index, noise), after, rtol=2e-6, atol=2e-6)


def test_guidance_is_the_originals() -> None:
    cond, uncond = OFFICIAL["guided.output"].chunk(2)
    for name, channels in (("three", 3), ("all", 4)):
        torch.testing.assert_close(guided(cond, uncond, 4.0, channels), OFFICIAL[f"guided.{name}"][:2], rtol=0, atol=0)


def test_the_true_noise_leads_to_the_picture() -> None:
    """A network that knows the picture, and the least variance: the chain ends at the picture itself."""
    picture, along = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(1)), chain(20)
    kept = dict(zip(along.timesteps, along.kept.tolist()))

    def network(x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        level = kept[int(times[0])]
        return torch.cat(((x - picture * level**0.5) / (1 - level) ** 0.5, torch.full_like(x, -1.0)), dim=1)

    found = sample(network, torch.randn(2, 4, 4, 4), torch.tensor([3, 5]), null=10, steps=20, scale=1.0)
    torch.testing.assert_close(found, picture, rtol=1e-4, atol=1e-4)


def test_a_model_is_sampled_with_guidance() -> None:
    torch.manual_seed(0)
    model = DiT(DiTConfig(hidden_size=32, depth=1, num_heads=2, side=8, classes=10)).eval()
    asked: list[tuple[Tensor, Tensor, Tensor]] = []

    def network(x: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        asked.append((x, times, labels))
        return model(x, times, labels)

    noise, labels = torch.randn(2, 4, 8, 8), torch.tensor([3, 7])
    found = [sample(network, noise, labels, null=10, steps=3, scale=scale, generator=torch.Generator().manual_seed(1))
             for scale in (4.0, 1.0, 4.0)]
    assert found[0].isfinite().all() and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    x, times, given = asked[0]
    assert torch.equal(x, torch.cat((noise, noise))) and times.tolist() == [999.0] * 4 and given.tolist() == [3, 7, 10, 10]
    assert [int(times[0]) for _, times, _ in asked[3:6]] == [999, 500, 0] and asked[3][2].tolist() == [3, 7]
