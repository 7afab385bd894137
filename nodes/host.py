"""The bridge to ComfyUI's sampling: per-run state, and which evaluation, pass and branch a model call belongs to.

Only an OUTER_SAMPLE wrapper with an immutable configuration is put on the MODEL. When sampling starts it opens a
`Session` and puts the other wrappers on that run's copy of the options; when sampling ends, also by an interrupt, both
are gone.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_management import InterruptProcessingException
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from torch import Tensor, nn

from ..dydit_core.budget import Plan, forecast
from ..dydit_core.families.flux import FluxFamily
from ..dydit_core.parts import Extent, Geometry
from ..dydit_core.recorder import Recorder
from ..dydit_core.runtime import Branches, Method, Run, running
from ..dydit_core.trace import Trace
from . import report
from .backend import ComfyBackend
from .events import STORE, Address, LiveMap, Status, current_workflow, keep_status, send, status_event
from .latents import HandedOut

KEY = "dydit"
FAMILY = FluxFamily()
BACKEND = ComfyBackend()
_COND = 0
_REMEDY = "Take that node out, or set the budget to 1.0."
_KNOWN_FORWARDS = ("comfy.ldm.flux.layers", "torch.nn.modules.container")
_TOKEN_CHANGERS = ("attn1_patch", "attn1_output_patch", "post_input")


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
    id: str = ""

    def here(self) -> Address:
        """Asked for when sampling starts: a cached MODEL may have been made in another tab's workflow."""
        return Address(self.address.node, current_workflow() or self.address.workflow)

    def plan(self, model_sampling: Any) -> Plan:
        return Plan(
            budget=self.budget,
            start_sigma=float(model_sampling.percent_to_sigma(self.start_percent)),
            end_sigma=float(model_sampling.percent_to_sigma(self.end_percent)),
            min_keep=self.min_keep,
            branch_share=self.branch_share,
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The module behind a compiled one."""
    return getattr(model, "_orig_mod", model)


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
            _refuse(options, guider.model_patcher)
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
        finally:
            guider.model_options = options
            session.close()


def _refuse(options: dict, patcher: Any) -> None:
    _refuse_patches(options.get("transformer_options", {}))
    block = _replaced(patcher)
    if block:
        raise ValueError(
            f"DyDiT Budget: another node replaced the forward of {block}, which token skipping would put aside. {_REMEDY}")
    if options.get("context_handler") is not None:
        raise ValueError("DyDiT Budget: a Context Windows node runs this picture window by window, and a budget is kept on whole pictures. "
                         f"{_REMEDY}")
    if patcher.get_additional_models_with_key("multigpu"):
        raise ValueError("DyDiT Budget: MultiGPU CFG Split runs the branches on several cards at once, and a budget is kept on one. "
                         f"{_REMEDY}")


def _refuse_patches(transformer_options: dict) -> None:
    """They come from the MODEL, and by hooks from a prompt."""
    patches = transformer_options.get("patches", {})
    found = [name for name in _TOKEN_CHANGERS if patches.get(name)]
    if found:
        raise ValueError(
            f"DyDiT Budget: another node patches this model's attention or tokens ({', '.join(found)}), which cannot be "
            f"combined with token skipping yet. {_REMEDY}")


def _replaced(patcher: Any) -> str | None:
    """Name of a block, or of an MLP in it, that will run another forward than the host's, or None.

    The patcher is asked, not the module: what another clone of the MODEL patched is still there until this one is loaded.
    """
    model = unwrapped(patcher.get_model_object("diffusion_model"))
    restated = set(FAMILY.blocks(model))
    restated |= {module for block in restated for module in block.children() if isinstance(module, nn.Sequential)}
    for name in (name for name, module in model.named_modules() if module in restated):
        module, key = patcher.get_model_object(f"diffusion_model.{name}"), f"diffusion_model.{name}.forward"
        forward = patcher.get_model_object(key) if key in patcher.object_patches or module is model.get_submodule(name) else module.forward
        # A module that torch.compile wrapped has a forward of its own, around the whole block.
        if not hasattr(module, "_orig_mod") and not _is_the_hosts(getattr(forward, "__func__", None), module):
            return name
    return None


def _is_the_hosts(forward: Any, module: nn.Module) -> bool:
    """By where it was written: another pack may have patched the host's class, or put a class of its own there."""
    return forward is type(module).forward and forward.__globals__["__name__"] in _KNOWN_FORWARDS


class Session:
    """One sampling run: feeds `Run` with sigmas, passes and branches, and says on the node what happened."""

    def __init__(self, settings: Settings, patcher: Any, sigmas: Tensor, address: Address, idle_conds: tuple[str, ...] = ()) -> None:
        self.settings, self.patcher, self.id, self.address, self.idle_conds = settings, patcher, uuid.uuid4().hex, address, idle_conds
        # The model is evaluated at every sigma but the last, which is not 0 where a later sampler goes on.
        self.schedule = [float(sigma) for sigma in sigmas[:-1].cpu() if sigma > 0]
        # Not `.model.model_sampling`: a shift node's patch is put there when the model is loaded, later than this.
        plan = settings.plan(patcher.get_model_object("model_sampling"))
        self.blocks = FAMILY.names(unwrapped(patcher.get_model_object("diffusion_model")))
        # Starts a thread, so it comes when nothing can be refused any more.
        self.recorder = Recorder(LiveMap(self.address, self.id, len(self.schedule), self.blocks), patcher.load_device)
        self.run = Run(plan, settings.method, self.schedule, self.recorder)
        self.state = "failed"  # until sampling has ended in another way
        self.latents = HandedOut()
        self.outlook: report.Outlook | None = None
        self._passes = self._held = 0
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
        lines = report.after(self.settings.budget, achieved, count, seconds / count, self.outlook, self.state) + [*self.settings.notes]
        lines += report.unrecorded(self.recorder.taken, len(evaluations), self.recorder.late)
        dropped = self.recorder.taken - len(evaluations)
        status = Status(self.id, self.state, lines, self.settings.budget, achieved, seconds / count, dropped)
        event = status_event(self.address, status)
        STORE.put(Trace(self.id, event, evaluations, tuple(self.blocks), self.settings.id, self.latents.fingerprints(self.patcher.model)))
        send("dydit.status", event)

    def _prepare(self, executor: Any, patcher: Any, noise_shape: list[int], conds: dict[str, list[dict]], *args: Any, **kwargs: Any) -> Any:
        """The host fills the device with weights but for what it thinks the run needs: what we hold is part of that."""
        model, method = unwrapped(patcher.get_model_object("diffusion_model")), self.settings.method
        active = [cond for name, of_name in conds.items() if name not in self.idle_conds for cond in of_name]
        extents = [self._extent(model, _image_tokens(model, noise_shape, cond.get("reference_latents")), len(active), patcher.model)
                   for cond in active]
        self._held = sum(noise_shape[0] * method.row_bytes(extent) for extent in extents) + max(map(method.run_bytes, extents), default=0)
        with _reserved(patcher.model, self._held):
            return executor(patcher, noise_shape, conds, *args, **kwargs)

    def _extent(self, model: nn.Module, image_tokens: int, prompts: int, base: Any) -> Extent:
        geometry = Geometry(image_tokens, 0, *FAMILY.sizes(model))
        return extent(model, geometry, len(self.schedule), prompts, base.get_dtype_inference())

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
        _refuse_patches(options)
        if executor.class_obj.current_patcher.hook_patches:
            self.run.layouts.forget()  # scheduled LoRAs are written into the very weights, which do not show it
        model = unwrapped(executor.class_obj.diffusion_model)
        geometry, grid = _geometry(model, x, c_crossattn, kwargs.get("ref_latents"))
        branches = _branches(options, x.shape[0])
        self._device = x.device
        if self.outlook is None:
            self._announce(model, geometry)
        with running(self.run, FAMILY, model, geometry, branches, x.shape[0], grid, BACKEND):
            return executor(*call, **kwargs)

    def _announce(self, model: nn.Module, geometry: Geometry) -> None:
        costs, method = FAMILY.costs(model, geometry, BACKEND), self.run.method
        added = FAMILY.added_costs(model, geometry, method.router.low_rank)
        reach = [
            forecast(plan, method.router, self.schedule, costs, geometry.image_tokens, method.needs_history,
                     self.run.overhead(costs, geometry), added)
            for plan in (self.run.plan, Plan(**{**self.run.plan.__dict__, "budget": 0.0}))
        ]
        # Only a router that averages over padding too was trained for a number of text tokens.
        trained = getattr(method.router, "text_tokens", None)
        text = geometry.text_tokens if trained is not None else None
        whole = _whole_layers(model, getattr(method.router, "width", None) is not None)
        self.outlook = report.Outlook(self.settings.router, self.settings.substitute, *reach, self._held, whole, text, trained)
        lines = [*report.before(self.settings.budget, self.outlook), *self.settings.notes]
        send("dydit.status", status_event(self.address, Status(self.id, "running", lines, self.settings.budget)))


def extent(model: nn.Module, geometry: Geometry, sigmas: int, prompts: int, dtype: torch.dtype) -> Extent:
    """What decides how much memory a run holds."""
    blocks = FAMILY.blocks(model)
    weights = sum(layer.weight.nbytes for block in blocks for name, layer in FAMILY.layers(block).items()
                  if name in FAMILY.cut_by_width and BACKEND.unsliceable(layer) is None)
    return Extent(geometry, len(blocks), sigmas, prompts, dtype.itemsize, weights)


def _whole_layers(model: nn.Module, widths: bool) -> tuple[str, ...]:
    """Sentences on the layers that a method would cut and cannot."""
    lines = []
    for how, names in (("on every token", FAMILY.cut_by_tokens), ("at full width", FAMILY.cut_by_width if widths else ())):
        whole: dict[str, list[str]] = {}
        for block in FAMILY.blocks(model):
            for name in FAMILY.layers(block).keys() & set(names):
                reason = BACKEND.unsliceable(block.get_submodule(name))
                if reason is not None:
                    whole.setdefault(reason, []).append(name)
        lines += [report.whole_layers(how, layers, reason) for reason, layers in whole.items()]
    return tuple(lines)


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


def _grid(model: nn.Module, latent_shape: Sequence[int]) -> tuple[int, int]:
    """Token rows and columns of a latent [..., height, width]; its edges are padded to whole tokens."""
    patch = getattr(model, "patch_size", 2)
    return -(-latent_shape[-2] // patch), -(-latent_shape[-1] // patch)


def _image_tokens(model: nn.Module, latent_shape: Sequence[int], references: list[Tensor] | None) -> int:
    """Of the picture and of its reference images."""
    return sum(prod(_grid(model, shape)) for shape in (latent_shape, *(latent.shape for latent in references or ())))


def _geometry(model: nn.Module, x: Tensor, context: Tensor, references: list[Tensor] | None) -> tuple[Geometry, tuple[int, int]]:
    grid, count = _grid(model, x.shape), _image_tokens(model, x.shape, references)
    return Geometry(count, context.shape[1], *FAMILY.sizes(model)), grid


def _branches(options: dict, rows: int) -> Branches:
    """Which batch rows are cond; ComfyUI joins uncond and cond into one batch where it can."""
    kinds = options.get("cond_or_uncond") or [_COND]
    each, keys = rows // len(kinds), tuple(options.get("uuids") or kinds)
    cond = [index for index, kind in enumerate(kinds) if kind == _COND]
    if not cond:
        return Branches(keys, slice(0, 0), slice(0, rows))
    start, stop = cond[0] * each, (cond[-1] + 1) * each
    if (stop - start) != len(cond) * each or (start > 0 and stop < rows):
        return Branches(keys, slice(0, rows), slice(rows, rows))  # not two runs of rows: every row alike
    return Branches(keys, slice(start, stop), slice(stop, rows) if start == 0 else slice(0, start))
