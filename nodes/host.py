"""The bridge to ComfyUI's sampling: per-run state, and which evaluation, pass and branch a model call belongs to.

Only an OUTER_SAMPLE wrapper with an immutable configuration is put on the MODEL. When sampling starts it opens a
`Session` and puts the other wrappers on that run's copy of the options; when sampling ends, also by an interrupt, both
are gone.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor, nn

from ..dydit_core.budget import Plan, forecast
from ..dydit_core.families.known import family_of
from ..dydit_core.parts import Extent, Geometry
from ..dydit_core.recorder import Recorder
from ..dydit_core.regions import Regions
from ..dydit_core.runtime import Method, Run, running
from ..dydit_core.trace import Trace
from . import report
from .events import STORE, Address, LiveMap, Status, current_prompt, keep_status, send, status_event
from .latents import HandedOut
from .model import BACKEND, branches_of, extent_of, geometry_of, image_tokens, token_grid, unwrapped, whole_layers
from .refusals import refuse, refuse_latent, refuse_masks, refuse_patches, refuse_prompts

KEY = "dydit"


@dataclass(frozen=True)
class Settings:
    """What one DyDiT Budget node was set to; `router` and `substitute` name the parts of `method`.

    `notes`: sentences that stay on the node, before, in and after a run. `id`: of the MODEL that carries these, given by
    `install`; its runs are found by it.
    """

    budget: float
    router: str
    substitute: str
    method: Method
    start_percent: float
    end_percent: float
    min_keep: float
    branch_share: float
    address: Address
    notes: tuple[str, ...] = ()
    regions: Regions = Regions()
    id: str = ""

    def here(self) -> Address:
        """Asked for when sampling starts: a cached MODEL may have been made in another tab's workflow."""
        return Address(self.address.node, current_prompt()[1] or self.address.workflow)

    def plan(self, model_sampling: Any) -> Plan:
        return Plan(
            budget=self.budget,
            start_sigma=float(model_sampling.percent_to_sigma(self.start_percent)),
            end_sigma=float(model_sampling.percent_to_sigma(self.end_percent)),
            min_keep=self.min_keep,
            branch_share=self.branch_share,
        )


def install(model: Any, settings: Settings) -> Any:
    """A clone of the MODEL that samples under `settings`; an earlier DyDiT Budget on it is replaced."""
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _OuterSample(replace(settings, id=uuid.uuid4().hex)))
    return patched


def installed(model: Any) -> Settings | None:
    """Settings of the DyDiT Budget that this MODEL has come through, if any."""
    wrappers = model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return wrappers[0].settings if wrappers else None


@dataclass(frozen=True)
class _OuterSample:
    """The wrapper on the MODEL: opens a `Session` when sampling starts, and closes it when it ends."""

    settings: Settings

    def __call__(self, executor: Any, noise: Tensor, latent: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Tensor | None = None,
                 callback: Callable | None = None, *args: Any, **kwargs: Any) -> Any:
        guider = executor.class_obj
        options = guider.model_options
        address = self.settings.here()
        try:
            refuse(options, guider.model_patcher)
            refuse_latent(unwrapped(guider.model_patcher.get_model_object("diffusion_model")), noise.shape)
            refuse_masks(self.settings.regions, noise.shape)
        except ValueError as error:
            keep_status(address, "failed", [str(error)], self.settings.budget)
            raise
        session = Session(self.settings, guider.model_patcher, sigmas, address, _idle_conds(guider))
        try:
            guider.model_options = session.wrap(comfy.model_patcher.create_model_options_clone(options))
            latents, callback = session.latents, session.latents.listening(callback)
            latents.result = executor(noise, latent, sampler, sigmas, denoise_mask, callback, *args, **kwargs)
            session.state = "done"
            return latents.result
        except InterruptProcessingException:
            session.state = "interrupted"
            raise
        except Exception as error:
            session.error = next(iter(str(error).splitlines()), "")
            raise
        finally:
            guider.model_options = options
            session.close()


class Session:
    """One sampling run: feeds `Run` with sigmas, passes and branches, and says on the node what happened."""

    def __init__(self, settings: Settings, patcher: Any, sigmas: Tensor, address: Address, idle_conds: tuple[str, ...] = ()) -> None:
        self.settings, self.patcher, self.id, self.address, self.idle_conds = settings, patcher, uuid.uuid4().hex, address, idle_conds
        # The model is evaluated at every sigma but the last, which is not 0 where a later sampler goes on.
        self.schedule = [float(sigma) for sigma in sigmas[:-1].cpu() if sigma > 0]
        # Not `.model.model_sampling`: a shift node's patch is put there when the model is loaded, later than this.
        plan = settings.plan(patcher.get_model_object("model_sampling"))
        model = unwrapped(patcher.get_model_object("diffusion_model"))
        self.blocks = family_of(model).names(model)
        # Starts a thread, so it comes when nothing can be refused any more.
        self.recorder = Recorder(LiveMap(self.address, self.id, len(self.schedule), self.blocks), patcher.load_device)
        self.run = Run(plan, settings.method, self.schedule, self.recorder, settings.regions)
        self.state, self.error = "failed", ""  # until sampling has ended in another way
        self.latents = HandedOut()
        self.outlook: report.Outlook | None = None
        self._passes = self._held = 0
        self.notes = list(settings.notes)
        self._size: list[int] | None = None  # tokens and batch rows of a forward
        self._started: float | None = None
        self._device: torch.device | None = None

    def wrap(self, options: dict) -> dict:
        """Put this run's wrappers on its own copy of the model options."""
        for kind, wrapper in ((WrappersMP.PREPARE_SAMPLING, self._prepare), (WrappersMP.PREDICT_NOISE, self._evaluation),
                              (WrappersMP.CALC_COND_BATCH, self._pass), (WrappersMP.APPLY_MODEL, self._forward)):
            add_wrapper_with_key(kind, KEY, wrapper, options, is_model_options=True)
        return options

    def close(self) -> None:
        """Sampling is over, well or not: drop all history, keep the trace, tell the node."""
        if self._device is not None and self._device.type == "cuda" and self.state == "done":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._started if self._started is not None else 0.0
        self.run.finish()
        evaluations = self.recorder.finish()
        count = max(1, len(self.run.ledger.spent))
        achieved = self.run.ledger.achieved if self.run.ledger.spent else None
        outcome = report.Outcome(self.state, self.error, achieved, count, seconds / count)
        lines = report.after(self.settings.budget, outcome, self.outlook) + self.notes
        lines += report.unrecorded(self.recorder.taken, len(evaluations), self.recorder.late)
        dropped = self.recorder.taken - len(evaluations)
        status = Status(self.id, self.state, lines, self.settings.budget, achieved, seconds / count, self._size, dropped,
                        current_prompt()[0], ignored=self.outlook is not None and self.outlook.ignored,
                        floor=self.outlook.floor if self.outlook is not None else None)
        event = status_event(self.address, status)
        STORE.put(Trace(self.id, event, evaluations, tuple(self.blocks), self.settings.id, self.latents.fingerprints(self.patcher.model)))
        send("dydit.status", event)

    def _prepare(self, executor: Any, patcher: Any, noise_shape: list[int], conds: dict[str, list[dict]], *args: Any, **kwargs: Any) -> Any:
        """The host fills the device with weights but for what it thinks the run needs: what we hold is part of that."""
        model, method = unwrapped(patcher.get_model_object("diffusion_model")), self.settings.method
        refuse_prompts(model, conds)
        self.run.picture = token_grid(model, noise_shape)
        if self.settings.regions and any(cond.get("area") is not None for of_name in conds.values() for cond in of_name):
            self.notes.append("A prompt here is for an area; protect and prefer do not reach what is drawn for it.")
        active = [cond for name, of_name in conds.items() if name not in self.idle_conds for cond in of_name]
        extents = [self._extent(model, image_tokens(model, noise_shape, cond.get("reference_latents")), len(active), patcher.model)
                   for cond in active]
        self._held = sum(noise_shape[0] * method.row_bytes(extent) for extent in extents) + max(map(method.run_bytes, extents), default=0)
        with _reserved(patcher.model, self._held):
            return executor(patcher, noise_shape, conds, *args, **kwargs)

    def _extent(self, model: nn.Module, image_tokens: int, prompts: int, base: Any) -> Extent:
        geometry = family_of(model).geometry(model, image_tokens)
        return extent_of(model, geometry, len(self.schedule), prompts, base.get_dtype_inference())

    def _evaluation(self, executor: Any, x: Tensor, timestep: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self._started is None:
            self._started = time.perf_counter()  # loading the model is over: it is not part of a step
        # The one read of a device value per evaluation, before the model's forward: plans are functions of sigma.
        self.run.arrive(float(timestep.flatten()[0]))
        self._passes = 0
        return executor(x, timestep, *args, **kwargs)

    def _pass(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        self._passes += 1
        return executor(*args, **kwargs)

    def _forward(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Tensor | None = None,
                 control: Any = None, transformer_options: dict | None = None, **kwargs: Any) -> Any:
        options = transformer_options or {}
        call = (x, t, c_concat, c_crossattn, control, options)
        # Later passes of one evaluation are extra guidance (SLG, PAG): dense, and not part of the budget.
        if self._passes > 1 or self.run.index < 0:
            return executor(*call, **kwargs)
        refuse_patches(options)
        if executor.class_obj.current_patcher.hook_patches:
            self.run.layouts.forget()  # scheduled LoRAs are written into the very weights, which do not show it
        model = unwrapped(executor.class_obj.diffusion_model)
        geometry, grid = geometry_of(model, x, c_crossattn, kwargs.get("ref_latents"))
        branches = branches_of(options, x.shape[0])
        self._device = x.device
        if self.outlook is None:
            self._announce(model, geometry, grid, x.shape[0], x.device)
        with running(self.run, family_of(model), model, geometry, branches, x.shape[0], grid, BACKEND):
            return executor(*call, **kwargs)

    def _earlier(self) -> tuple[float, float] | None:
        """What this node's last finished run of this size spent, and its seconds an evaluation."""
        for trace in STORE.newest_first():
            facts = trace.facts
            if (facts["node"], facts["workflow"], facts["state"], facts["size"]) == (self.address.node, self.address.workflow, "done", self._size):
                return facts["achieved"], facts["seconds_per_step"]
        return None

    def _announce(self, model: nn.Module, geometry: Geometry, grid: tuple[int, ...], rows: int, device: torch.device) -> None:
        self._size = [geometry.tokens, rows]
        family, method = family_of(model), self.run.method
        costs, added = family.costs(model, geometry, BACKEND), family.added_costs(model, geometry, method.router.low_rank)
        protected = self.run.zones(grid, geometry.image_tokens).least
        reach = [
            forecast(plan, method.router, self.schedule, costs, geometry.image_tokens, method.needs_history,
                     self.run.overhead(costs, geometry), added, protected, partial(family.level, model))
            for plan in (self.run.plan, replace(self.run.plan, budget=0.0))
        ]
        trained = method.router.text_tokens
        text = geometry.text_tokens if trained is not None else None
        whole = whole_layers(model, method.router.units is not None)
        self.outlook = report.Outlook(
            self.settings.router, self.settings.substitute, *reach, self._held, whole, text, trained, len(self.schedule),
            device.type == "cuda" and report.idles(rows * geometry.tokens, geometry.width), self._earlier(),
            protected / geometry.image_tokens, geometry.text_tokens > 0, self.settings.min_keep,
            (self.settings.start_percent, self.settings.end_percent) != (0.0, 1.0))
        lines = [*report.before(self.settings.budget, self.outlook), *self.notes]
        send("dydit.status", status_event(self.address, Status(self.id, "running", lines, self.settings.budget, ignored=self.outlook.ignored)))


def _idle_conds(guider: Any) -> tuple[str, ...]:
    """Prompts that the host does not run: at cfg 1 the negative one would change nothing."""
    alone = getattr(guider, "cfg", None) == 1.0 and not guider.model_options.get("disable_cfg1_optimization")
    return ("negative",) if alone else ()


@contextmanager
def _reserved(model: Any, extra: int) -> Iterator[None]:
    """What the host estimates that `model` needs is `extra` bytes more."""
    before, estimate = vars(model).get("memory_required"), model.memory_required
    model.memory_required = lambda *args, **kwargs: estimate(*args, **kwargs) + extra
    try:
        yield
    finally:
        del model.memory_required
        if before is not None:
            model.memory_required = before


