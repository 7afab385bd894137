"""Random tokens: the control that every router must beat. For benchmarks and tests."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kept import Kept
from ..memory import Rowless
from ..parts import Allotment, Gate, Outlook, Router, Setting
from .change import falling


@dataclass(frozen=True)
class RandomRouter(Router):
    seed: int = 0

    def start(self, setting: Setting) -> RandomState:
        return RandomState(self.seed)


class RandomState(Rowless):
    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def keep(self, outlook: Outlook) -> Allotment:
        return falling(outlook, early=1.0)

    def scores(self, gate: Gate) -> Tensor:
        return torch.rand(gate.image.shape[:2], generator=self.generator).to(gate.image.device)

    def computed(self, gate: Gate, kept: Kept | None) -> None:
        return None
