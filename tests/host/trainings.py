"""Small trainings of the tiny FLUX through the node, each in a folder of its own."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import as_node, flux, prompt  # first: starts the host

import comfy.model_management
import folder_paths
from dydit_pack.dydit_core.checkpoints.adapter import Adapter
from dydit_pack.dydit_core.train import session
from dydit_pack.nodes import teacher, training
from dydit_pack.nodes.train import DyDiTTrain

PROMPTS = [prompt(seed) for seed in range(1, 5)]
LISTS = ("positive", "negative", "latents")
DEFAULTS = {"steps": 4, "what": "tokens", "width": 64, "height": 64, "name": "t", "substitute": "nothing", "sampling_steps": "3", "runs": 4, "batch": 8,
            "learning_rate": 0.01, "cfg": 1.0, "seed": 0}


@pytest.fixture(autouse=True)
def quick_and_clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Import this: adapters are calibrated on few evaluations, products are float32 on every machine, and no test finds the
    folders of another."""
    calibrate = session.calibrate
    monkeypatch.setattr(session, "calibrate", lambda *args: calibrate(*args[:-1], min(args[-1], 48)))
    monkeypatch.setattr(teacher, "half_products", lambda patcher: False)
    yield
    shutil.rmtree(folder().parent, ignore_errors=True)
    comfy.model_management.interrupt_current_processing(False)


def train(**inputs: Any) -> tuple[Adapter, torch.Tensor]:
    """What a DyDiT Train node gives; `inputs` as the node has them."""
    values = {"model": flux(), "positive": PROMPTS, **DEFAULTS, **inputs}
    return as_node(DyDiTTrain).EXECUTE_NORMALIZED(**{name: value if name in LISTS else [value] for name, value in values.items()}).result


def folder(name: str = "t") -> Path:
    return Path(folder_paths.get_output_directory()) / "dydit_training" / name


def losses(name: str = "t") -> list[float]:
    return torch.load(folder(name) / "training.pt", weights_only=True)["losses"]


def said() -> dict:
    """What the node says by now."""
    return training.last_event("5", "w")
