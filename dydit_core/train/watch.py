"""What is told of a training while it runs: lines with the time left, curves, sheets of samples."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from ..plot import Axis, Point, Series, around, lines
from ..storage import write_atomically
from .router import RouterRun, summary
from .session import Job
from .trajectories import Trajectories

LINE_EVERY = 10
# Losses of so many steps are averaged for a point of their curve.
SMOOTH = 5

Log = Callable[[str], None]


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


class Watch:
    """Called by `session.train`: `recorded` after dense runs, the object itself after every step."""

    def __init__(self, job: Job, data: list[Trajectories], folder: Path, save_every: int, grid_every: int,
                 sheet: Callable[[], Image.Image], log: Log) -> None:
        self._job, self._data, self._folder = job, data, folder
        self._save_every, self._grid_every, self._sheet, self._log = save_every, grid_every, sheet, log
        self._made, self._clock, self._first = self._runs(), time.monotonic(), None

    def _runs(self) -> int:
        return sum(int(runs.made.sum()) for runs in self._data)

    def recorded(self) -> None:
        made, total = self._runs(), sum(len(runs.made) for runs in self._data)
        left = (time.monotonic() - self._clock) / max(1, made - self._made) * (total - made)
        self._log(f"dense run {made}/{total}, {duration(left)} left")

    def __call__(self, run: RouterRun) -> None:
        if self._first is None:  # the clock starts behind the first step, which is slower than the others
            self._first, self._clock = run.step, time.monotonic()
        steps, taken = self._job.recipe.steps, run.step - self._first
        if taken and (run.step % LINE_EVERY == 0 or run.step == steps):
            pace = (time.monotonic() - self._clock) / taken
            left = duration(pace * (steps - run.step))
            self._log(f"step {run.step}/{steps}  {summary(run, self._job.recipe)}  {pace:.2f} s a step, {left} left")
        if run.step % self._save_every == 0 and run.step < steps:
            self.draw(run)
            if self._grid_every and run.step % (self._save_every * self._grid_every) == 0:
                self.draw_sheet(run)

    def draw(self, run: RouterRun) -> None:
        """Write the curves."""
        draw_curves(run, self._job, self._folder)

    def draw_sheet(self, run: RouterRun) -> None:
        """Write the sheet of the adapter in the folder."""
        _save(self._sheet(), self._folder / f"samples_{run.step}.png")


def draw_curves(run: RouterRun, job: Job, folder: Path) -> None:
    means = [Point(end, sum(run.losses[end - SMOOTH : end]) / SMOOTH, "") for end in range(SMOOTH, len(run.losses) + 1)]
    # A budget that no step has trained yet has no error.
    errors = [Series(f"budget {budget:g}", [Point(step, found[level], "") for step, found in run.curve if found[level]])
              for level, budget in enumerate(job.recipe.budgets)]
    _draw(f"Loss, means of {SMOOTH} steps", "loss", [Series("", means)], run.step, folder / "loss.png")
    _draw("How far a few gated evaluations lead off the dense run", "error, dB of the run's way", errors, run.step, folder / "error.png")


def _draw(title: str, unit: str, series: list[Series], step: int, path: Path) -> None:
    values = [point.y for one in series for point in one.points]
    if len(values) > len(series):
        _save(lines(title, Axis("training steps", 0, step), around(unit, values), series, dots=False), path)


def _save(image: Image.Image, path: Path) -> None:
    write_atomically(path, lambda partial: image.save(partial, "PNG"))
