"""How near pictures and videos are to dense ones (PSNR, SSIM), to what they were asked for (accuracy), and pictures to drawn
scenes as a whole (scene-FID).

Scene-FID is to the classifier's last hidden activations what FID is to those of Inception: the Fréchet distance between two
sets of pictures, here in percent of the activations' variance over drawn scenes. With 256 pictures in 160 dimensions it is
too high, for every row alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from ..compare import psnr, psnr_of_differences, ssim
from ..demo.checker import Checker, load_checker
from ..demo.files import CHECKER_FILE
from ..demo.motion import moves_as_said
from ..storage import write_atomically
from .detail import detailed
from .lab import PROMPTS, Lab, Shot, digest

REAL_SCENES, _BATCH = 2048, 64


@dataclass(frozen=True, kw_only=True)
class Measured:
    """`spent`: FLOPs ÷ those of the reference's run; PSNR in dB, None where nothing differs; `accuracy` of what was asked for 0…1;
    `gigaflops` of the blocks and `seconds` of sampling (None: not measured alone) for one picture or video.

    Of pictures alone: `psnr_detail` on detailed tokens, `fid`. Of videos alone: `psnr_median`, that of the video in the middle, as
    one that turns into another decides `psnr`; `psnr_differences` of what changes between frames."""

    spent: float
    psnr: float | None
    ssim: float
    accuracy: float
    gigaflops: float
    seconds: float | None
    psnr_detail: float | None = None
    fid: float | None = None
    psnr_median: float | None = None
    psnr_differences: float | None = None


class Judge(ABC):
    """Measures what a lab draws; holds one reference at a time."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._reference: tuple[Shot, Tensor] | None = None

    def key(self, shot: Shot, reference: Shot) -> dict:
        """Everything that decides what is measured, but our own code."""
        return {"shot": self.lab.key(shot), "reference": self.lab.key(reference)}

    @torch.no_grad()
    def measure(self, shot: Shot, reference: Shot) -> Measured:
        images, spent, seconds = self.lab.pictures(shot)
        gigaflops = self.lab.gigaflops(shot, spent)
        dense = self._dense(reference)
        frames, others = images.flatten(0, -4), dense.flatten(0, -4)
        alike = sum(ssim(one, other) for one, other in zip(frames, others)) / len(frames)
        return Measured(spent=spent * shot.steps / reference.steps, psnr=_finite(psnr(frames, others)), ssim=alike, gigaflops=gigaflops,
                        seconds=seconds, **self.looks(images, dense))

    @abstractmethod
    def looks(self, images: Tensor, dense: Tensor) -> dict[str, float | None]:
        """The other numbers of `Measured`, by name."""

    def _dense(self, shot: Shot) -> Tensor:
        if self._reference is None or self._reference[0] != shot:
            self._reference = shot, self.lab.pictures(shot)[0]
        return self._reference[1]


class PictureJudge(Judge):
    """Of pictures [rows, 3, 256, 256]: with the demo's checker."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        path = lab.settings.weights / CHECKER_FILE
        self.checker = load_checker(path)
        kind = "" if lab.settings.of == PROMPTS else f"{lab.settings.of}_"
        self.real = _real_activations(lab, self.checker, lab.settings.folder / f"real_{kind}{REAL_SCENES}_{digest(path)}.pt")

    def key(self, shot: Shot, reference: Shot) -> dict:
        return {**super().key(shot, reference), "real": REAL_SCENES, "checker": digest(self.lab.settings.weights / CHECKER_FILE)}

    def looks(self, images: Tensor, dense: Tensor) -> dict[str, float | None]:
        with caught(self.checker.heads) as activations:
            accurate = self.lab.accuracy(images, self.checker)
        fid = 100 * frechet(torch.cat(activations), self.real) / float(self.real.var(0).sum())
        return {"psnr_detail": _finite(psnr(images, dense, detailed(dense))), "accuracy": accurate, "fid": fid}


class VideoJudge(Judge):
    """Of videos [rows, frames, 3, H, W]: whether things go the way that their class says, and how like the changes between frames are."""

    def looks(self, images: Tensor, dense: Tensor) -> dict[str, float | None]:
        right = moves_as_said(images, self.lab.conditioning[0]).float().mean().item()
        middle = median(psnr(video, other) for video, other in zip(images, dense))
        return {"psnr_median": _finite(middle), "psnr_differences": _finite(psnr_of_differences(images, dense)), "accuracy": right}


def frechet(some: Tensor, others: Tensor) -> float:
    """Fréchet distance between two sets of activations [n, d], each taken as a normal distribution."""
    # Importing torchmetrics takes seconds, and every command of ours would pay for it.
    from torchmetrics.image.fid import FrechetInceptionDistance

    fid = FrechetInceptionDistance(feature=_Activations(some.shape[1]))
    fid.update(others.double(), real=True)
    fid.update(some.double(), real=False)
    return float(fid.compute())


class _Activations(nn.Identity):
    """What torchmetrics takes for its network, where its pictures are activations already."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.num_features = features


@contextmanager
def caught(layer: nn.Module) -> Iterator[list[Tensor]]:
    """What goes into `layer`, call by call."""
    inputs: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        yield inputs
    finally:
        handle.remove()


def _real_activations(lab: Lab, checker: Checker, file: Path) -> Tensor:
    """[REAL_SCENES, 160] of freshly drawn scenes, from `file` or made now."""
    if not file.exists():
        with caught(checker.heads) as activations, torch.no_grad():
            for start in range(0, REAL_SCENES, _BATCH):
                checker(lab.real(start, start + _BATCH))
        write_atomically(file, lambda partial: torch.save(torch.cat(activations), partial))
    return torch.load(file, weights_only=True)


def _finite(decibels: float) -> float | None:
    return decibels if math.isfinite(decibels) else None
