"""`train --dry-run`: one double and one single block at true sizes, measured, and what a whole training takes of them.

Memory and seconds of this machine are measured on these two blocks and multiplied; embedders and the last layer, below 1 % of
a FLUX, are left out. For the 24 GB card the FLOPs are counted and divided by a speed that is assumed and said.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..bench.report import machine, table
from ..demo.files import BASE_FILE, WEIGHTS
from ..models.flux import FluxConfig
from ..parts import Geometry
from .bases import PRECISIONS, TYPES, empty_model, held_type, read_base, teacher_of
from .class_bases import find_class_base
from .examples import load_examples
from .gates import Gates, Past, TrainingPass
from .processes import join
from .router import Recipe, new_gates
from .settings import FLUX_DEV, SettingError, Settings
from .subject import latent_size, recipe_of
from .teacher import Teacher
from .watch import duration

# RTX 4090: dense bf16 products with float32 sums, by its maker's table; two fifths of it is what large transformers reach.
CARD, CARD_FLOPS, CARD_SHARE = "RTX 4090", 165e12, 0.4
CARD_BYTES, CARD_SET_ASIDE = 24 * 2**30, 1.5e9
# Text tokens where no examples say it: ComfyUI pads T5 to as many; the demo's own number.
TEXT, DEMO_TEXT = 256, 16
LAST_SAMPLES, SAVE_SAMPLES = 512, 64
_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_FORMULAS = {_CPU: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v),
             _CPU_BACKWARD: lambda grad, q, k, v, *args, out_shape=None, **kwargs: sdpa_backward_flop_count(grad, q, k, v)}


@dataclass(frozen=True)
class Sizes:
    """What is trained, in numbers. `stored`: the type of the blocks' matrices; `disk`: bytes of the dense runs."""

    config: FluxConfig
    geometry: Geometry
    stored: torch.dtype
    recipe: Recipe
    runs: int
    branches: int
    saves: int
    disk: int

    @property
    def evaluations(self) -> dict[str, tuple[float, float]]:
        """Rows that are evaluated, by what for: (forward alone, forward and backward)."""
        recipe, windows = self.recipe, self.recipe.steps * self.recipe.batch
        before = 1 if recipe.reuse else 0
        beside = recipe.window if recipe.align else 0
        checked = (LAST_SAMPLES + SAVE_SAMPLES * self.saves) * (recipe.window + before) / recipe.window
        return {"dense runs": (self.runs * sum(recipe.counts) * self.branches, 0),
                "training steps": (windows * (before + beside), windows * recipe.window),
                "calibration": (checked, 0)}


@dataclass(frozen=True)
class Cost:
    """Of one block: FLOPs and seconds of a row, forward alone and in training; bytes that one row and that none keeps for the
    gradient, and that the block takes while it is computed again for it."""

    forward: float
    training: float
    forward_seconds: float
    training_seconds: float
    kept: tuple[float, float]
    again: tuple[float, float]


def sizes_of(settings: Settings) -> Sizes:
    """From the header of the base. Raises FileError or SettingError."""
    if settings.base == FLUX_DEV:
        config, stored = FluxConfig(guidance_embed=True), torch.float8_e4m3fn
    else:
        if not settings.demo and find_class_base(settings.base_file) is not None:
            raise SettingError("--dry-run is for FLUX alone; the first steps of a DiT, SiT or Latte say what they take.")
        base = read_base(WEIGHTS / BASE_FILE if settings.demo else settings.base_file)
        config, stored = base.config, TYPES[base.types["double_blocks.0.img_mlp.0.weight"]]
    recipe, size, text = recipe_of(settings), latent_size(settings, config), DEMO_TEXT if settings.demo else TEXT
    if settings.examples is not None and settings.base != FLUX_DEV:
        examples = load_examples(settings.examples)
        text, size = examples.conditioning[0].shape[1], size if examples.latents is None else tuple(examples.latents.shape[1:])
    geometry = Geometry(size[1] * size[2] // 4, text, config.hidden_size, config.mlp_ratio)
    branches = 1 if settings.cfg[-1] == 1 else 2
    disk = 2 * settings.runs * prod(size) * sum(1 + count * (1 + branches) for count in recipe.counts)
    return Sizes(config, geometry, stored, recipe, settings.runs, branches, (settings.steps - 1) // settings.save_every, disk)


class Bench:
    """The two blocks at true sizes with random weights and gates, on `device`."""

    def __init__(self, sizes: Sizes, settings: Settings, device: torch.device) -> None:
        torch.manual_seed(0)
        self.sizes, self.device, self.precision = sizes, device, PRECISIONS[settings.precision]
        config, geometry = replace(sizes.config, depth=1, depth_single_blocks=1), sizes.geometry
        # The demo is held in single precision (see `subject.prepare`).
        self.rest = torch.float32 if settings.demo else self.precision
        model = empty_model(config).to_empty(device=device)
        for name, param in model.named_parameters():
            param.data = (torch.randn(param.shape, device=device) * 0.02).to(held_type(name, param, sizes.stored, self.rest))
        self.kept, self.again = (teacher_of(model, self.precision, 1.0, settings.guidance, checkpointing)
                                 for checkpointing in (settings.checkpointing, False))
        self.gates = new_gates(self.kept, sizes.recipe).to(device)
        self.table = torch.randn(1, 1, geometry.tokens, config.head_dim // 2, 2, 2, device=device)

    def evaluate(self, teacher: Teacher, index: int, rows: int, training: bool) -> Tensor:
        """Run block number `index`; the sum of what comes out, which has a gradient where `training`."""
        geometry = self.sizes.geometry

        def values(*shape: int, dtype: torch.dtype = self.rest) -> Tensor:
            return torch.randn(rows, *shape, geometry.width, device=self.device, dtype=dtype)

        past = Past({index: values(geometry.image_tokens, dtype=self.precision)}) if self.sizes.recipe.reuse else None
        sigmas = torch.full((rows,), 0.5, device=self.device)
        current = TrainingPass(self.gates if training else Gates(), geometry.text_tokens, sigmas, past=past)
        streams = {"img": geometry.image_tokens, "txt": geometry.text_tokens} if index == 0 else {"x": geometry.tokens}
        inputs = {name: values(tokens).requires_grad_(training) for name, tokens in streams.items()}
        with torch.set_grad_enabled(training), torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            block = teacher.family.blocks(teacher.model)[index]
            found = teacher.family.forward(block, index, current, teacher.backend, **inputs, vec=values(), pe=self.table)
        return sum(part.float().sum() for part in (found if isinstance(found, tuple) else (found,)))

    def cost(self, index: int) -> Cost:
        # A GPU is filled by a whole group alone, a CPU by a row.
        rows = self.sizes.recipe.group if self.device.type == "cuda" else 1
        flops, seconds = [], []
        for training in (False, True):
            def work() -> None:
                found = self.evaluate(self.kept, index, rows, training)
                found.backward() if training else None

            with FlopCounterMode(display=False, custom_mapping=_FORMULAS) as counter:
                work()  # first calls allocate, and a counter takes time
            flops.append(counter.get_total_flops() / rows)
            start = self._now()
            work()
            seconds.append((self._now() - start) / rows)
        again = self._saved(self.again, index) if self.again.family != self.kept.family else (0.0, 0.0)
        return Cost(*flops, *seconds, self._saved(self.kept, index), again)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _saved(self, teacher: Teacher, index: int) -> tuple[float, float]:
        """Bytes kept for the gradient, of a row and beside the rows: what two rows add to one."""
        known = [*teacher.model.parameters(), *self.gates.parameters(), self.table]
        one, two = (saved_bytes(lambda: self.evaluate(teacher, index, rows, True), known) for rows in (1, 2))
        return two - one, 2 * one - two


def saved_bytes(work: Callable[[], Tensor], without: list[Tensor]) -> int:
    """What autograd keeps of `work` for the backward pass, but for the tensors `without`."""
    seen: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        work()
    known = {tensor.untyped_storage().data_ptr() for tensor in without}
    return sum(tensor.untyped_storage().nbytes() for place, tensor in seen.items() if place not in known)


def weight_bytes(config: FluxConfig, stored: torch.dtype, precision: torch.dtype) -> int:
    """Of a whole base as `bases.load_base` holds it."""
    model = empty_model(config)
    return sum(value.numel() * held_type(name, value, stored, precision).itemsize for name, value in model.state_dict().items())


def trained_numbers(config: FluxConfig, recipe: Recipe) -> int:
    """How many numbers a training of the whole base trains."""
    teacher = teacher_of(empty_model(config), torch.float32, shift=1.0, guidance=0.0, checkpointing=False)
    with torch.device("meta"):
        return sum(param.numel() for param in new_gates(teacher, recipe).parameters())


def memory(sizes: Sizes, bench: Bench, costs: tuple[Cost, Cost]) -> dict[str, float]:
    """Bytes of a training step, by what they are."""
    recipe, geometry, depths = sizes.recipe, sizes.geometry, (sizes.config.depth, sizes.config.depth_single_blocks)
    rows, history = recipe.group, recipe.group * geometry.image_tokens * geometry.width * bench.precision.itemsize
    kept = sum(depth * (rows * cost.kept[0] + cost.kept[1]) for depth, cost in zip(depths, costs))
    return {"base": weight_bytes(sizes.config, sizes.stored, bench.rest),
            "kept for the gradient": recipe.window * kept,
            "a block computed again": max(rows * cost.again[0] + cost.again[1] for cost in costs),
            "history to reuse": (recipe.window + 1) * sum(depths) * history if recipe.reuse else 0,
            "gates, their gradient, Adam": 16 * trained_numbers(sizes.config, recipe)}


def totals(sizes: Sizes, costs: tuple[Cost, Cost]) -> dict[str, tuple[float, float]]:
    """(FLOPs, seconds here) of each part of the run."""
    depths = sizes.config.depth, sizes.config.depth_single_blocks

    def whole(name: str) -> float:
        return sum(depth * getattr(cost, name) for depth, cost in zip(depths, costs))

    return {part: (forward * whole("forward") + training * whole("training"),
                   forward * whole("forward_seconds") + training * whole("training_seconds"))
            for part, (forward, training) in sizes.evaluations.items()}


def estimate(settings: Settings, log: Callable[[str], None]) -> None:
    """Measure, and tell what the whole run takes. Raises FileError or SettingError."""
    _, device = join(settings.device)
    sizes = sizes_of(settings)
    config, geometry, recipe = sizes.config, sizes.geometry, sizes.recipe
    log(f"FLUX of width {config.hidden_size}, {config.depth} + {config.depth_single_blocks} blocks, stored as {str(sizes.stored)[6:]}, "
        f"products in {settings.precision}; {geometry.image_tokens} image and {geometry.text_tokens} text tokens")
    bench = Bench(sizes, settings, device)
    costs = bench.cost(0), bench.cost(1)
    held, parts = memory(sizes, bench, costs), totals(sizes, costs)
    log(f"\nOne row of one block, measured on {machine(device)}:\n\n{_block_table(costs)}")
    log(f"\nMemory of a step, {recipe.group} rows at a time and {recipe.window} evaluations in a row:\n\n{_memory_table(held)}")
    log(f"\nTime of the whole run, {recipe.steps} steps of {recipe.batch} rows, {sizes.runs} dense runs of each of "
        f"{', '.join(map(str, recipe.counts))} steps:\n\n{_time_table(parts)}")
    flops, seconds = (part / recipe.steps for part in parts["training steps"])
    log(f"\nA training step: {seconds:.3g} s here, {flops / CARD_FLOPS / CARD_SHARE:.3g} s on the {CARD}.")
    _verdict(settings, sizes, sum(held.values()), device, log)


def _block_table(costs: tuple[Cost, Cost]) -> str:
    rows = [(name, f"{cost.forward / 1e12:.4g}", f"{cost.forward_seconds:.3g}", f"{cost.training / 1e12:.4g}",
             f"{cost.training_seconds:.3g}", f"{cost.kept[0] / 1e6:.1f}", f"{cost.again[0] / 1e6:.0f}")
            for name, cost in zip(("double", "single"), costs)]
    return table(("block", "forward TFLOP", "s", "training TFLOP", "s", "MB kept", "MB inside"), rows)


def _memory_table(held: dict[str, float]) -> str:
    rows = [*held.items(), ("together", sum(held.values()))]
    return table(("what", "GB"), [(name, f"{amount / 1e9:.2f}") for name, amount in rows])


def _time_table(parts: dict[str, tuple[float, float]]) -> str:
    rows = [*parts.items(), ("together", tuple(map(sum, zip(*parts.values()))))]
    cells = [(name, f"{flops / 1e15:.4g}", duration(seconds), duration(flops / CARD_FLOPS / CARD_SHARE)) for name, (flops, seconds) in rows]
    return table(("what", "PFLOP", "this machine", CARD), cells)


def _verdict(settings: Settings, sizes: Sizes, needed: float, device: torch.device, log: Callable[[str], None]) -> None:
    here, wanted = _memory_here(device), needed + CARD_SET_ASIDE
    if here is not None:
        log(f"This machine: {'fits' if needed < here else 'does not fit'}, {needed / 1e9:.1f} GB of {here / 1e9:.1f} GB.")
    log(f"Disk: the dense runs take {sizes.disk / 1e9:.2f} GB in {settings.work}.")
    less = "" if wanted < CARD_BYTES else "; take the base in fp8, a smaller --group or --window, or fewer pixels"
    log(f"A 24 GB card: {'fits' if wanted < CARD_BYTES else 'does not fit'}, {wanted / 1e9:.1f} GB of {CARD_BYTES / 1e9:.1f} GB{less}.")
    log(f"Estimated, not measured: the {CARD} at {CARD_SHARE:.0%} of its {CARD_FLOPS / 1e12:.0f} TFLOPS in bf16, and "
        f"{CARD_SET_ASIDE / 1e9:g} GB for CUDA and gaps. Left out: embedders, the last layer, the optimizer's arithmetic, sample sheets.")


def _memory_here(device: torch.device) -> float | None:
    """Bytes; None where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
