"""The class-conditional demo models as files, and what such a file draws: the DiT, the SiT and the Latte."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..budget import Plan
from ..checkpoints.dit import find_dit
from ..checkpoints.source import open_source
from ..models.dit import EPS, DiT, DiTConfig
from ..models.latte import Latte
from ..routers.dit import DiTRouters
from ..runtime import Method
from ..sampling import eps_sigmas, sample, sigmas
from ..standalone import Budgeted
from ..storage import write_atomically
from .phase import averaged


def export(checkpoint: Path, config: DiTConfig, names: Sequence[str], target: Path, title: str) -> None:
    """The averaged weights in half precision, under the names of the authors' files; `names` of the classes."""
    tensors = {key: value.half().contiguous() for key, value in averaged(checkpoint).items()}
    facts = {"classes": json.dumps(names), "prediction": config.prediction, "heads": str(config.num_heads), "modelspec.title": title}
    write_atomically(target, lambda partial: save_file(tensors, partial, facts))


@dataclass(frozen=True)
class ClassModel:
    """What is in a file that `export` wrote; `routers` are None in a dense one's."""

    model: DiT | Latte
    routers: DiTRouters | None

    @property
    def schedule(self) -> Callable[[int], list[float]]:
        return eps_sigmas if self.model.config.prediction == EPS else sigmas

    def draw(self, labels: Tensor, steps: int = 20, cfg: float = 1.0, seed: int = 0, method: Method | None = None,
             budget: float = 1.0) -> tuple[Tensor, float]:
        """Latents [labels, 4, …, H, W] by Euler steps (for EPS those of DDIM), and the budget they spent; without a method they are
        dense. Label i always gets the same noise."""
        config, schedule = self.model.config, self.schedule(steps)
        noise = schedule[0] * torch.stack([torch.randn(config.latent_size, generator=torch.Generator().manual_seed(seed + row))
                                           for row in range(len(labels))])
        none = (torch.tensor([config.classes]),)
        if method is None:
            return sample(self.model.denoise_direction, (labels,), noise, steps, cfg, none, schedule), 1.0
        with Budgeted(self.model, Plan(budget), method, schedule) as budgeted:
            latents = sample(budgeted, (labels,), noise, steps, cfg, none, schedule)
        return latents, budgeted.spent.achieved


def load_class_model(path: Path) -> ClassModel:
    """Raises FileError."""
    found = find_dit(open_source(path))
    return ClassModel(found.read_model(), found.read_routers())


def by_class(right: Tensor, labels: Tensor, names: Sequence[str]) -> str:
    """Of what was drawn for `labels` [rows], the share that is `right` [rows], in words for each class."""
    return ", ".join(f"{name} {100 * right[labels == index].mean():.0f} %" for index, name in enumerate(names))
