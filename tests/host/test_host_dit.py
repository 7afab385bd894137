"""DiT and SiT as a MODEL of the host: the pictures of plain torch, and what a graph does to a model."""

from __future__ import annotations

import pytest
import torch
from tiny_dit import CLASSES, config, dit, euler, network, sample  # first: starts the host

import comfy.samplers
from dydit_pack.dydit_core.models.dit import EPS, FLOW, eps_log_sigmas

BOTH = pytest.mark.parametrize("prediction", [EPS, FLOW])


def sigmas_of(prediction: str, steps: int, scheduler: str = "simple") -> torch.Tensor:
    return comfy.samplers.calculate_sigmas(dit(prediction).get_model_object("model_sampling"), scheduler, steps)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def test_the_hosts_noise_levels_are_dits() -> None:
    sampling = dit(EPS).get_model_object("model_sampling")
    torch.testing.assert_close(sampling.sigmas.double(), eps_log_sigmas().exp(), rtol=1e-5, atol=0)
    assert 156 < float(sampling.sigma_max) < 158


@BOTH
@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_class_through_the_hosts_sampler_is_the_picture_of_plain_torch(prediction: str, cfg: float) -> None:
    expected = euler(config(prediction), sigmas_of(prediction, 6), 3, cfg, batch=2)
    close(sample(dit(prediction), 6, cfg, batch=2), expected)
    assert expected.std() > 0.1 and (expected - euler(config(prediction), sigmas_of(prediction, 6), 4, cfg, batch=2)).abs().max() > 0.1 * expected.std()
