"""Runs one training for the DyDiT Train node: in its folder, with its progress on the node, and every way it can end."""

from __future__ import annotations

import logging
import math
import time
import traceback
from collections import OrderedDict
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
from comfy.model_management import InterruptProcessingException

from ..dydit_core import wire
from ..dydit_core.checkpoints.adapter import Adapter, load_adapter
from ..dydit_core.train.router import Diverged, RouterRun
from ..dydit_core.train.session import ADAPTER, Job, OtherRun, begin, claim, keep, plan, train
from ..dydit_core.train.teacher import Teacher
from ..dydit_core.train.trajectories import Trajectories
from .events import Address, send
from .examples import Gathered
from .teacher import NODE, teacher_of

MOST = 160
SAVE_EVERY = 50  # steps; a save costs about as much as two of them
# Of PyTorch's writer and of safetensors', which raise no OSError where the disk is full.
_FULL = ("inline_container", "PytorchStreamWriter", "No space left")
_INTERVAL = 0.5  # seconds between two events, at least
_SOCKETS = {"rate": "learning_rate", "counts": "sampling_steps", "size": "width or height", "prompts": "positive, negative or latents",
            "base": "model (its weights or LoRAs)", "shift": "model (its shift)", "reuse": "substitute", "window": "substitute",
            "budgets": "substitute or what", "groups": "what", "experts": "what", "kind": "what"}
# The last event of each node, for pages that are loaded later.
LAST: OrderedDict[Address, dict] = OrderedDict()
_KEPT = 8


class Progress:
    """Tells the node, and the host's progress bar, how a training goes: first the dense runs, then the steps."""

    def __init__(self, address: Address, job: Job, data: list[Trajectories], run: RouterRun | None = None) -> None:
        self.address, self.job, self.data, self.run = address, job, data, run
        self._made = self._evaluations()  # there before this began
        self._first = self._steps()
        self._total = sum(len(runs.made) * runs.steps for runs in data)
        self._bar = comfy.utils.ProgressBar(max(1, self._total - self._made + job.recipe.steps - self._first))
        self._clock, self._sent = time.monotonic(), float("-inf")
        self.say("recording" if self._made < self._total else "training")

    def _evaluations(self) -> int:
        """Of the dense runs that are there."""
        return sum(int(runs.made.sum()) * runs.steps for runs in self.data)

    def _steps(self) -> int:
        return 0 if self.run is None else self.run.step

    def recorded(self) -> None:
        self._tell("recording")

    def stepped(self, run: RouterRun) -> None:
        if run.step == self._first + 1:
            self._clock = time.monotonic()  # behind the first step, which also pays for starting up
        self._tell("training")
        if run.step == self.job.recipe.steps:
            self.say("finishing")
        comfy.model_management.throw_exception_if_processing_interrupted()

    def _tell(self, state: str) -> None:
        self._bar.update_absolute(self._evaluations() - self._made + self._steps() - self._first)
        if time.monotonic() - self._sent >= _INTERVAL:
            self.say(state)

    def say(self, state: str, lines: tuple[str, ...] = ()) -> None:
        """`state`: recording, training, finishing, done, interrupted or failed. `lines`: sentences for the node."""
        self._sent = time.monotonic()
        done, total, before = (self._evaluations(), self._total, self._made) if state == "recording" else (
            self._steps(), self.job.recipe.steps, self._first + 1)
        seconds = (self._sent - self._clock) / (done - before) if done > before else None
        points = curve_of(self.run)
        say(self.address, state, lines, done=done, total=total, seconds=seconds, left=None if seconds is None else seconds * (total - done),
            budgets=self.job.recipe.budgets, steps=[step for step, _ in points], errors=[errors for _, errors in points])


def curve_of(run: RouterRun | None) -> list[tuple[int, list[float | None]]]:
    """(step, dB at each budget), at most MOST points and the last; None where a budget was not trained by then."""
    if run is None or not run.step:
        return []
    before = [point for point in run.curve if point[0] < run.step]
    points = [*before[:: -(-len(before) // MOST) or 1], (run.step, run.gauge[:, 1].tolist())]
    return [(step, [round(error, 2) if error and math.isfinite(error) else None for error in errors]) for step, errors in points]


def say(address: Address, state: str, lines: tuple[str, ...], **facts: Any) -> None:
    """Send what the node shows, and keep it for pages that ask later."""
    event = {"v": wire.VERSION, **asdict(address), "state": state, "lines": list(lines), **facts}
    LAST[address] = event
    LAST.move_to_end(address)
    while len(LAST) > _KEPT:
        LAST.popitem(last=False)
    send("dydit.training", event)


def last_event(node: str, workflow: str) -> dict:
    """What a node said last; empty where it never trained."""
    return LAST.get(Address(node, workflow), {})


def run_training(model: Any, gathered: Gathered, job: Job, folder: Path, address: Address) -> tuple[Adapter, RouterRun]:
    """Begin or continue the training in `folder`. Raises ValueError with a sentence. Call it while `teacher.training`."""
    progress = Progress(address, job, [])
    state: tuple[RouterRun, Teacher, list[Trajectories]] | None = None
    try:
        examples = gathered.examples
        rows = max(job.recipe.group, 4 if job.cfg == (1.0, 1.0) else 8)  # of a step, and of a dense evaluation
        teacher = teacher_of(model, gathered.guidance, job.size, examples.conditioning[0].shape[1], rows)
        claim(folder, job, teacher, examples)
        data = plan(job, teacher, examples, folder)
        run = begin(job, teacher, data, folder)
        state = run, teacher, data
        progress = Progress(address, job, data, run)
        train(run, job, teacher, data, folder, progress.stepped, save_every=SAVE_EVERY, recorded=progress.recorded)
        progress.say("done", (*gathered.notes, f"Trained for {run.step} steps; kept in {folder}."))
        return load_adapter(folder / ADAPTER), run
    except InterruptProcessingException:
        progress.say("interrupted", (_kept(job, folder, state),))
        raise
    except Exception as error:
        sentence = _sentence(error, job, folder, state)
        progress.say("failed", (sentence,))
        raise ValueError(sentence) from error


def _kept(job: Job, folder: Path, state: tuple[RouterRun, Teacher, list[Trajectories]] | None, again: bool = True) -> str:
    """Bring the adapter in `folder` up to date, and say what is there; `again`: the same inputs can go on from it."""
    run, onward = state[0] if state is not None else None, " Queue it again to go on." if again else ""
    if run is None or not run.step:
        return f"Stopped before the first step; the dense runs made so far are in {folder}.{onward}"
    try:
        keep(run, job, *state[1:], folder, samples=64)
    except Exception as error:
        logging.warning("%s: the adapter could not be brought up to date: %s", NODE, error)
    where = f"; the adapter so far is {folder / ADAPTER}" if (folder / ADAPTER).exists() else ""
    line = f"Stopped after step {run.step}{where}.{onward}"
    logging.info("%s: %s", NODE, line)
    return line


def _sentence(error: Exception, job: Job, folder: Path, state: tuple[RouterRun, Teacher, list[Trajectories]] | None) -> str:
    """What went wrong and what to do."""
    text = str(error)
    if isinstance(error, OtherRun):
        inputs = ", ".join(sorted({_SOCKETS.get(key, key) for key in error.different}))
        return (f"{NODE}: name {folder.name} is that of another training (it differs in: {inputs}); write another name, or delete the folder {folder} "
                "to begin anew.")
    if isinstance(error, Diverged):
        return f"{NODE}: {text.split(';')[0]}; lower learning_rate (now {job.recipe.rate:g}) and write another name. What was saved before is whole."
    if comfy.model_management.is_oom(error) or isinstance(error, MemoryError) or "can't allocate memory" in text:
        traceback.clear_frames(error.__traceback__)  # they hold what filled the memory
        comfy.model_management.soft_empty_cache()
        return f"{NODE}: out of memory at {job.size[2] * 8} × {job.size[1] * 8} pixels; lower width and height under another name. {_kept(job, folder, state, again=False)}"
    if isinstance(error, OSError) or any(word in text for word in _FULL):
        return f"{NODE}: {folder} cannot be written to ({getattr(error, 'strerror', None) or text.splitlines()[0]}); free some space and queue it again. What was saved before is whole."
    return text if text.startswith(NODE) else f"{NODE}: {type(error).__name__}: {text}"
