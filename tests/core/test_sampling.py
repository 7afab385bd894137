import pytest
import torch
from torch import Tensor

from dydit_core.sampling import sample, sigmas

CONTEXT, POOLED = torch.zeros(2, 3, 4), torch.zeros(2, 5)


def test_sigmas_are_evenly_spaced() -> None:
    assert sigmas(4) == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_straight_flow_arrives_exactly_in_any_number_of_steps() -> None:
    noise, target = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    for steps in (1, 3, 20):
        found = sample(lambda x, sigma, context, pooled: noise - target, (CONTEXT, POOLED), noise, steps)
        assert torch.allclose(found, target, atol=1e-5)


def test_linear_velocity_has_eulers_answer() -> None:
    noise = torch.ones(2, 1, 2, 2)
    found = sample(lambda x, sigma, context, pooled: x, (CONTEXT, POOLED), noise, steps=4)
    assert torch.allclose(found, noise * 0.75**4)


def test_guidance_extrapolates_from_the_empty_prompt() -> None:
    def velocity(x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        return torch.full_like(x, context.mean().item())

    asked, empty = CONTEXT + 2.0, (CONTEXT[:1] + 1.0, POOLED[:1])
    found = sample(velocity, (asked, POOLED), torch.zeros(2, 1, 2, 2), steps=5, cfg=3.0, uncond=empty)
    assert torch.allclose(found, torch.full_like(found, -4.0))


def test_guidance_without_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="uncond"):
        sample(lambda x, sigma, context, pooled: x, (CONTEXT, POOLED), torch.zeros(2, 1, 2, 2), cfg=2.0)
