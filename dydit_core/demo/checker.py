"""A small network that looks at a picture and says what is in it: does a sample show what its prompt asked for?"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..storage import write_atomically
from ..train.resume import resume, save
from .data import Log, draw, load_codec, training_scene
from .scenes import COLORS, GROUNDS, KINDS, PLACES, TIMES, Scene
from .vae import Decoder, decode

NONE = len(KINDS)
ATTRIBUTES = ("time", "ground", "kind", "color", "empty")
# Output widths: time, ground, then kind (or nothing) and colour for each place.
HEADS = (len(TIMES), len(GROUNDS), *(len(KINDS) + 1, len(COLORS)) * len(PLACES))
INPUT = 128
PICTURES, BATCH, RATE = 6144, 64, 2e-3
# One picture in eight goes through the VAE, as samples do; decoding all of them would take longer than training.
DECODED = 8
SAVE_EVERY = 200
# Far from the training scenes and from the held-out ones.
FRESH = 10_000_000


class Checker(nn.Module):
    """Images [rows, 3, 256, 256] in 0…1 to one row of logits per head."""

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 96, 96)
        layers: list[nn.Module] = []
        for inputs, outputs in zip(widths, widths[1:]):
            layers += [nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.GroupNorm(8, outputs), nn.ReLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(widths[-1], 24, 1), nn.ReLU(), nn.Flatten())
        self.hidden = nn.Linear(24 * (INPUT // 16) ** 2, 160)
        self.heads = nn.Linear(160, sum(HEADS))

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        small = F.interpolate(images, size=(INPUT, INPUT), mode="area")
        return self.heads(F.relu(self.hidden(self.features(small * 2 - 1)))).split(HEADS, dim=1)


def labels(scenes: list[Scene]) -> Tensor:
    """[scenes, heads]: the right answer for every head; the colour of nothing is -100 (not asked)."""
    rows = []
    for scene in scenes:
        row = [TIMES.index(scene.time), GROUNDS.index(scene.ground)]
        for place in PLACES:
            thing = scene.at(place)
            row += [KINDS.index(thing.kind), list(COLORS).index(thing.color)] if thing else [NONE, -100]
        rows.append(row)
    return torch.tensor(rows)


@torch.no_grad()
def accuracy(images: Tensor, scenes: list[Scene], checker: Checker) -> dict[str, float]:
    """Share of right answers (0…1) per attribute and their "mean".

    `kind` and `color` count the places where the scene has an object, `empty` those where it has none.
    """
    answers = torch.cat([torch.stack([head.argmax(1) for head in checker(rows)], 1) for rows in images.split(32)])
    truth = labels(scenes)
    right = (answers == truth).float()
    kinds, colors = right[:, 2::2], right[:, 3::2]
    there = truth[:, 2::2] != NONE
    result = {
        "time": right[:, 0].mean().item(),
        "ground": right[:, 1].mean().item(),
        "kind": kinds[there].mean().item(),
        "color": colors[there].mean().item(),
        "empty": kinds[~there].mean().item(),
    }
    return {**result, "mean": sum(result.values()) / len(result)}


def train_checker(work: Path, decoder: Decoder, steps: int, seed: int = 0, log: Log = print) -> Checker:
    """Train, or continue, the checker in `work` until it has taken `steps` steps."""
    torch.manual_seed(seed)
    checker = Checker()
    optimizer = torch.optim.AdamW(checker.parameters(), RATE, weight_decay=1e-3)
    path = work / "checker.pt"
    first = resume(path, checker, optimizer)
    if first >= steps:
        return checker.eval()
    images, truth = _pictures(work, decoder, log)
    for step in range(first, steps):
        optimizer.param_groups[0]["lr"] = RATE * min(1.0, (steps - step) / (0.7 * steps))
        loss = _train_step(checker, optimizer, images, truth, torch.Generator().manual_seed(seed + step))
        done = step + 1
        if done % SAVE_EVERY == 0 or done == steps:
            log(f"checker step {done} loss {loss:.4f}")
            save(path, checker, optimizer, done)
    return checker.eval()


def export_checker(checker: Checker, target: Path) -> None:
    tensors = {key: value.half().contiguous() for key, value in checker.state_dict().items()}
    write_atomically(target, lambda partial: save_file(tensors, partial))


def load_checker(path: Path) -> Checker:
    checker = Checker()
    checker.load_state_dict({key: value.float() for key, value in load_file(path).items()})
    return checker.eval().requires_grad_(False)


def fresh_scenes(count: int) -> list[Scene]:
    """Scenes that neither the checker nor the base model was trained on."""
    return [training_scene(FRESH + index)[0] for index in range(count)]


def _pictures(work: Path, decoder: Decoder, log: Log) -> tuple[Tensor, Tensor]:
    """Half-size pictures [n, 3, 128, 128] as bytes and their labels."""
    codec = load_codec(work, log)
    images, scenes = [], [training_scene(index)[0] for index in range(PICTURES)]
    for start in range(0, PICTURES, BATCH):
        batch = draw(scenes[start : start + BATCH])
        batch[::DECODED] = decode(codec.to_latent(batch[::DECODED]), decoder)
        images.append((F.interpolate(batch, size=(INPUT, INPUT), mode="area") * 255).round().byte())
        if start % (BATCH * 32) == 0:
            log(f"checker pictures {start + BATCH} / {PICTURES}")
    return torch.cat(images), labels(scenes)


def _train_step(checker: Checker, optimizer: torch.optim.Optimizer, images: Tensor, truth: Tensor,
                generator: torch.Generator) -> float:
    index = torch.randint(len(images), (BATCH,), generator=generator)
    heads = checker(_disturb(images[index].float() / 255, generator))
    answers = truth[index].unbind(1)
    loss = torch.stack([F.cross_entropy(head, answer) for head, answer in zip(heads, answers)]).sum()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.item()


def _disturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Small faults of contrast, brightness, colour, sharpness and grain, so that samples are judged by content."""
    rows = len(images)

    def spread(width: float, channels: int = 1) -> Tensor:
        return width * (2 * torch.rand(rows, channels, 1, 1, generator=generator) - 1)

    blurred = F.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    images = torch.lerp(images, blurred, torch.rand(rows, 1, 1, 1, generator=generator))
    images = (images - 0.5) * (1 + spread(0.12)) + 0.5 + spread(0.05) + spread(0.03, 3)
    shift = torch.randint(-6, 7, (2,), generator=generator).tolist()
    images = torch.roll(images, shift, dims=(2, 3))
    return (images + spread(0.04).abs() * torch.randn(images.shape, generator=generator)).clamp(0, 1)
