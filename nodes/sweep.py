"""DyDiT Sweep: everything after it runs once for each of several budgets, and the dense run is timed like the others."""

from __future__ import annotations

import re
import time
import uuid
from dataclasses import dataclass
from typing import Any

import comfy.model_patcher
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.latest import io

from ..dydit_core.trace import Trace, fingerprint
from .events import STORE, Address, Status, status_event
from .host import installed
from .schema import schema

KEY = "dydit_stopwatch"
_MOST = STORE.runs


class DyDiTSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTSweep",
            display_name="DyDiT Sweep",
            description="A list of budgets: everything after it runs once for each, and DyDiT Sweep Sheet lays the results side by side.",
            search_aliases=["budget sweep", "xy plot", "benchmark", "grid"],
            inputs=[
                io.Model.Input("model", tooltip="The model as it would go into DyDiT Budget, for example FLUX.1 dev."),
                io.String.Input("budgets", default="1.0, 0.75, 0.5, 0.35",
                                tooltip=f"Compute budgets from 0.2 to 1.0, at most {_MOST}, separated by commas; 1.0 is the dense picture that the "
                                        "others are held to. Example: 1.0, 0.75, 0.5."),
            ],
            outputs=[
                io.Model.Output("timed_model", display_name="model",
                                tooltip="The model with a stopwatch, for DyDiT Budget: so that the dense run is timed like the others."),
                io.Float.Output("budget", display_name="budget", is_output_list=True,
                                tooltip="One budget after the other, for the slider of DyDiT Budget (drag the link onto it)."),
            ],
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, budgets: str) -> io.NodeOutput:
        timed = model.clone()
        timed.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
        timed.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, Stopwatch(uuid.uuid4().hex))
        return io.NodeOutput(timed, parse(budgets))


def run_of(model: Any, samples: torch.Tensor) -> Trace | None:
    """The kept run of this MODEL that gave this latent; of a dense one if a DyDiT Sweep is before it."""
    settings, watches = installed(model), model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    config = settings.id if settings is not None else watches[0].id if watches else ""
    return STORE.find(config, fingerprint(samples)) if config else None


def parse(text: str) -> list[float]:
    """Budgets, the lowest first: what starting up costs is then never a gain of ours."""
    words = [word for word in re.split(r"[,;\s]+", text.strip()) if word]
    try:
        budgets = sorted({float(word) for word in words})
    except ValueError:
        budgets = []
    if not budgets or not all(0.2 <= budget <= 1.0 for budget in budgets):
        raise ValueError(f'DyDiT Sweep: budgets is "{text[:60]}"; write numbers from 0.2 to 1.0 with commas between them, for example 1.0, 0.75, 0.5.')
    if 1.0 not in budgets:
        raise ValueError(f'DyDiT Sweep: budgets is "{text[:60]}" without 1.0, the dense picture that the others are held to; add it.')
    if len(budgets) > _MOST:
        raise ValueError(f"DyDiT Sweep: budgets has {len(budgets)} numbers, and the server keeps the last {_MOST} runs; take some out.")
    return budgets


@dataclass(frozen=True)
class Stopwatch:
    """An OUTER_SAMPLE wrapper that times a run without DyDiT Budget, and otherwise stays out of the way."""

    id: str

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        if installed(guider.model_patcher) is not None:
            return executor(*args, **kwargs)  # timed there
        started: list[float] = []

        def evaluation(inner: Any, *inputs: Any, **more: Any) -> Any:
            started.append(time.perf_counter())
            return inner(*inputs, **more)

        before = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(before)
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, evaluation, guider.model_options, is_model_options=True)
        try:
            result = executor(*args, **kwargs)
        finally:
            guider.model_options = before
        if guider.model_patcher.load_device.type == "cuda":
            torch.cuda.synchronize(guider.model_patcher.load_device)
        if started:
            seconds = (time.perf_counter() - started[0]) / len(started)
            status = Status(uuid.uuid4().hex, "done", [], 1.0, 1.0, seconds)
            STORE.put(Trace(status.run, status_event(Address(""), status), (), config=self.id, fingerprints=(fingerprint(result),)))
        return result
