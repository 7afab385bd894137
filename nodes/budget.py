"""DyDiT Budget: the one slider."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..dydit_core.budget import Plan, forecast
from ..dydit_core.checkpoints.dit_adapter import DiTAdapter
from ..dydit_core.checkpoints.fit import layout_of
from ..dydit_core.checkpoints.routers import Routers
from ..dydit_core.families.known import family_of
from ..dydit_core.methods import AUTO, CHECKPOINT, LEARNED, METHODS, SUBSTITUTES, resolve
from ..dydit_core.models.dit import DiT
from ..dydit_core.models.latte import Latte
from ..dydit_core.parts import Geometry
from ..dydit_core.regions import Regions
from ..dydit_core.runtime import Method
from . import report
from .events import Address, Status, keep_status, send, status_event, workflow_id
from .host import Settings, install, installed
from .model import BACKEND, extent_of, unwrapped
from .schema import AdapterType, lenient, schema

_RANGES = {"budget": (0.2, 1.0, " (0.5 = half the FLOPs)"), "branch_share": (0.1, 10.0, " (1 = both prompts alike)"),
           "min_keep": (0.0, 1.0, " (0.1 = one token in ten)")}
_TOGETHER = "It was trained together with its routers: dense it draws other pictures, and not always better ones."
_STOPS = [{"offset": 0.0, "color": [0, 32, 76]}, {"offset": 0.5, "color": [124, 123, 120]}, {"offset": 1.0, "color": [255, 233, 69]}]


def _slider() -> Any:
    """The stock gradient slider where the host has it (dark: little is computed, bright: everything)."""
    display = getattr(io.NumberDisplay, "gradient_slider", io.NumberDisplay.slider)
    return lenient(
        io.Float.Input, "budget", default=0.75, min=0.2, max=1.0, step=0.01, round=0.01, display_mode=display,
        gradient_stops=_STOPS,
        tooltip="Compute budget: the part of the transformer blocks' FLOPs that may be spent, averaged over the run. "
                "1.0 leaves the model untouched; 0.5 spends half. Example: 0.75.",
    )


def _fraction(name: str, default: float, tooltip: str, **limits: float) -> Any:
    limits = {"min": 0.0, "max": 1.0, "step": 0.01, **limits}
    return lenient(io.Float.Input, name, default=default, round=0.01, tooltip=tooltip, advanced=True, **limits)


def _choices() -> list[Any]:
    methods = " ".join(f"{name}: {entry.why}" for name, entry in METHODS.items())
    return [
        lenient(io.Combo.Input, "method", options=[AUTO, *METHODS], default=AUTO, advanced=True,
                tooltip=f"Who decides what is computed. auto takes the best measured one. {methods}"),
        lenient(io.Combo.Input, "substitute", options=[AUTO, *SUBSTITUTES], default=AUTO, advanced=True,
                tooltip="What stands in for a skipped token. reuse: what it gave when last computed (needs memory). "
                        "nothing: its update is left out, as in the DyDiT paper (needs a trained router)."),
    ]


class DyDiTBudget(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DyDiTBudget",
            display_name="DyDiT Budget",
            description="Spend less compute on a FLUX, DiT, SiT or Latte model: one slider, and a live map of where the compute went.",
            search_aliases=["compute budget", "token skipping", "faster flux", "dynamic transformer", "cache"],
            inputs=[
                io.Model.Input("model", tooltip="A FLUX model (FLUX.1 dev, schnell, lite, or the demo model dydit_demo), a DiT, DyDiT or SiT, or a Latte, which draws videos."),
                AdapterType.Input("adapter", optional=True, tooltip="A trained router for this model, for the method "
                                  "learned tokens. The slider works without one too."),
                _slider(),
                *_choices(),
                _fraction("start_percent", 0.0, "Before this part of sampling every token is computed. 0 to 1 of the "
                          "schedule; example: 0.1 leaves the first tenth dense."),
                _fraction("end_percent", 1.0, "After this part of sampling every token is computed. 0 to 1 of the "
                          "schedule; example: 0.9 leaves the last tenth dense."),
                _fraction("min_keep", 0.10, "At least this part of the image tokens is computed in every block. 0 to 1; "
                          "example: 0.1 is one token in ten."),
                _fraction("branch_share", 1.0, "Tokens for the positive prompt ÷ tokens for the negative one, at the same "
                          "budget (cfg above 1). Example: 2 gives the positive prompt twice as many.", min=0.1, max=10.0, step=0.1),
                io.Mask.Input("protect", optional=True, tooltip="Where this mask is white, every token is computed in every step, whatever "
                              "the budget; that raises the floor. Any size: it is stretched over the picture. For a video, one mask for all frames or one for each. Example: a face."),
                io.Mask.Input("prefer", optional=True, tooltip="Where this mask is white, tokens are moved most of the way to the front; the budget stays the same "
                              "and the rest still has its turn. Grey counts in part. Example: the subject in white, the background in black."),
            ],
            outputs=[io.Model.Output(tooltip="The model with its budget, for a KSampler.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            # Puts the node id into the host's cache key; else two nodes set alike share one MODEL and one address.
            not_idempotent=True,
        )

    @classmethod
    def execute(cls, model: Any, budget: float, method: str, substitute: str, start_percent: float, end_percent: float,
                min_keep: float, branch_share: float, adapter: Any = None, protect: Any = None, prefer: Any = None) -> io.NodeOutput:
        address = Address(str(cls.hidden.unique_id or ""), workflow_id(cls.hidden.extra_pnginfo))
        if budget == 1.0:
            keep_status(address, "ready", _untouched(model, adapter), budget)
            return io.NodeOutput(model)
        try:
            _check_ranges(budget=budget, start_percent=start_percent, end_percent=end_percent, min_keep=min_keep, branch_share=branch_share)
            transformer = unwrapped(model.get_model_object("diffusion_model"))
            _refuse(transformer, adapter)
            regions = Regions(_mask("protect", protect), _mask("prefer", prefer))
            chosen = resolve(method, substitute, None if adapter is None else adapter.router)
        except ValueError as error:
            keep_status(address, "failed", [str(error)], budget)
            raise
        notes = _notes(transformer, adapter, method, chosen[0])
        settings = Settings(budget, *chosen, start_percent, end_percent, min_keep, branch_share, address, notes, regions)
        lines = [_reach(transformer, min_keep, settings.method), *notes]
        send("dydit.status", status_event(address, Status("", "ready", lines, budget)))
        return io.NodeOutput(install(model, settings))


def _check_ranges(**values: float) -> None:
    """A value that comes through a link or from a JSON is not held by the widget."""
    for name, value in values.items():
        low, high, example = _RANGES.get(name, (0.0, 1.0, ""))
        if not low <= value <= high:
            raise ValueError(f"DyDiT Budget: {name} is {value}; it must be between {low} and {high}{example}.")
    if values["start_percent"] >= values["end_percent"]:
        raise ValueError(f"DyDiT Budget: start_percent ({values['start_percent']}) must be below end_percent ({values['end_percent']}).")


def _mask(socket: str, mask: Any) -> Any:
    """[masks, height, width], its own copy on the CPU; None without one."""
    if mask is None:
        return None
    if mask.ndim not in (2, 3) or 0 in mask.shape or not mask.isfinite().all():
        raise ValueError(f"DyDiT Budget: {socket} is not a mask of finite numbers with a height and a width; connect a MASK, for example of Load Image.")
    return mask.detach().reshape(-1, *mask.shape[-2:]).float().cpu().clone()


def _notes(transformer: Any, adapter: Any, method: str, router: str) -> tuple[str, ...]:
    """What stays on the node before, in and after a run."""
    if adapter is None:
        return ()
    unused = f'The adapter is not used: auto takes {router}, which measured better. Set method to "{LEARNED}" to use it.'
    warning = adapter.fit.warning(transformer)
    return (*([unused] if method == AUTO and router not in (LEARNED, CHECKPOINT) else []), *([warning] if warning else []))


def _refuse(transformer: Any, adapter: Any) -> None:
    try:
        family = family_of(transformer)
    except ValueError as reason:
        raise ValueError(f"DyDiT Budget: {reason}. It works on FLUX.1 (dev, schnell, lite) and on DiT, SiT and Latte; take the node out, or set the budget to 1.0.") from None
    if adapter is not None:
        width, mlp_ratio = family.sizes(transformer)
        mismatch = adapter.fit.refusal(layout_of(transformer, width))
        if mismatch is None and not isinstance(adapter, Routers):
            mismatch = adapter.misfit(family.blocks(transformer)[0].num_heads, round(width * mlp_ratio))
        if mismatch:
            raise ValueError(f"DyDiT Budget: {mismatch}. Choose the adapter that was made for it, or disconnect the adapter.")


def _untouched(model: Any, adapter: Any) -> list[str]:
    earlier = installed(model)
    if earlier is None:
        untouched = "Budget 100 %: the model is untouched and nothing is recorded."
        return [untouched, _TOGETHER] if isinstance(adapter, (Routers, DiTAdapter)) else [untouched]
    return [f"Budget 100 % here, but an earlier DyDiT Budget on this model stays at {report.percent(earlier.budget)}."]


def _made_for(transformer: Any, width: int) -> tuple[str, int, int]:
    """Pixels in words, image tokens and text tokens of a usual picture or video."""
    if isinstance(transformer, (DiT, Latte)):
        config = transformer.config
        size = f"{8 * config.side} × {8 * config.side}"
        return f"{config.frames} frames of {size}" if isinstance(transformer, Latte) else size, config.tokens, 0
    return ("1024 × 1024", 4096, 256) if width >= 1024 else ("256 × 256", 256, 16)


def _reach(transformer: Any, min_keep: float, method: Method) -> str:
    """Floor and memory for a picture of the size the model is made for; the run's own follow when sampling starts."""
    family = family_of(transformer)
    width, mlp_ratio = family.sizes(transformer)
    size, tokens, text = _made_for(transformer, width)
    geometry = Geometry(tokens, text, width, mlp_ratio)
    costs = family.costs(transformer, geometry, BACKEND)
    added = family.added_costs(transformer, geometry, method.router.low_rank)
    floor = forecast(Plan(0.0, min_keep=min_keep), method.router, [0.5], costs, tokens, False, added=added)
    if floor is None:
        return report.IGNORED
    memory = method.row_bytes(extent_of(transformer, geometry, 1, 1, transformer.dtype))
    dense = ", after a first step at 100 %" if method.needs_history else ""
    held = f"; a run holds {report.size(memory)} for each image and branch" if memory else ""
    return f"At {size} a step costs at least {report.percent(floor)} of its block FLOPs{dense}{held}."
