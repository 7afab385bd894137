"""A sheet of samples: a few prompts, dense and at the budgets of an adapter, from the same noise."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL import Image
from torch import Tensor

from ..budget import Plan
from ..checkpoints.adapter import Adapter
from ..methods import as_trained
from ..sampling import sample
from ..sheet import contact_sheet
from ..standalone import Budgeted
from .examples import Examples
from .session import Job
from .teacher import Teacher

# Sampling steps of a sheet: of those that were trained for, the number nearest to this.
STEPS = 20

# Pictures of latents [n, C, H, W] or [n, C, frames, H, W]; the second argument are the dense latents of the same prompts.
Painter = Callable[[Tensor, Tensor], list[Image.Image]]


def false_colours(latents: Tensor, dense: Tensor) -> list[Image.Image]:
    """Without a VAE: the three directions in which the dense latents differ most, as red, green and blue; four frames of a video."""
    if latents.ndim == 5:
        latents, dense = _four_frames(latents), _four_frames(dense)
    pixels = dense.movedim(1, -1).flatten(0, 2)
    mean = pixels.mean(0)
    directions = torch.linalg.svd(pixels - mean, full_matrices=False).Vh[:3]
    shown, spread = (latents.movedim(1, -1) - mean) @ directions.T, ((pixels - mean) @ directions.T).std(0)
    pictures = (0.5 + shown / (5 * spread)).clamp(0, 1).movedim(-1, 1)
    return [image(picture).resize((8 * picture.shape[2], 8 * picture.shape[1]), Image.Resampling.NEAREST) for picture in pictures]


def _four_frames(latents: Tensor) -> Tensor:
    """[n, C, 2 H, 2 W] of [n, C, frames, H, W]: the first, the last and two between, in rows of two."""
    some = latents[:, :, torch.linspace(0, latents.shape[2] - 1, 4).round().long()]
    return some.unflatten(2, (2, 2)).transpose(3, 4).flatten(4).flatten(2, 3)


def image(picture: Tensor) -> Image.Image:
    """Of [3, H, W] in 0…1."""
    return Image.fromarray((picture.permute(1, 2, 0) * 255).round().byte().numpy())


def sample_sheet(teacher: Teacher, job: Job, examples: Examples, adapter: Adapter, paint: Painter, note: str) -> Image.Image:
    """A row for each prompt, a column for each budget; `note` is under the dense ones."""
    budgets = sorted(adapter.facts.budgets, reverse=True)
    levels = [1.0, *(budgets if len(budgets) < 4 else (budgets[0], budgets[len(budgets) // 2], budgets[-1]))]
    count = min(job.recipe.counts, key=lambda steps: abs(steps - STEPS))
    # As many prompts as columns: the sheet is then square, and its rows are prompts.
    index = torch.arange(len(levels)) % len(examples)
    columns, captions = [], []
    for level in levels:
        latents, spent = _sampled(teacher, job, examples, adapter, index, count, level)
        columns.append(latents)
        error = (latents - columns[0]).square().flatten(1).sum(1) / columns[0].square().flatten(1).sum(1)
        captions.append([["dense", note] if level == 1 else [f"budget {level:g}, spent {spent:.2f}", f"latents off by {part:.1f} dB"]
                         for part in (10 * error.log10()).tolist()])
    painted = [paint(latents, columns[0]) for latents in columns]
    cells = [(column, row) for row in range(len(levels)) for column in range(len(levels))]
    return contact_sheet([painted[column][row] for column, row in cells], [captions[column][row] for column, row in cells])


def _sampled(teacher: Teacher, job: Job, examples: Examples, adapter: Adapter, index: Tensor, count: int, level: float
             ) -> tuple[Tensor, float]:
    """Latents of the examples `index` on the CPU, and what they cost."""
    noise = torch.randn(len(index), *job.size, generator=torch.Generator().manual_seed(job.seed)).to(teacher.device)
    conditioning = tuple(part.to(teacher.device) for part in examples.given(index))
    uncond = tuple(none.to(part) for none, part in zip(examples.empty, conditioning))
    schedule = teacher.schedule(count)
    noise = schedule[0] * noise
    method = as_trained(adapter.router)
    if level == 1:
        return sample(teacher.velocity, conditioning, noise, count, job.cfg[0], uncond, schedule).cpu(), 1.0
    with Budgeted(teacher.model, Plan(level), method, schedule, velocity=teacher.velocity, backend=teacher.backend) as budgeted:
        latents = sample(budgeted, conditioning, noise, count, job.cfg[0], uncond, schedule)
    return latents.cpu(), budgeted.spent.achieved
