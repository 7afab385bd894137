"""Seconds per model evaluation of FLUX under a budget, against the same model dense.

Dense (the model's own forward, nothing of ours around it) and every budget take turns, one evaluation each, so that a
machine that slows down slows all of them. Medians of the evaluations after the first two: what a budget costs once
its history exists. "in theory" is the speed-up that the executed FLOPs of those same evaluations allow. Every forward
is timed with the plan, the router and the recording of the map; before timing, FLOPs are counted and compared with
what was booked, full capacity is compared with the dense output, and on CUDA a forward that waits for the device is
an error. Weights are random: they set no pace.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from statistics import mean, median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from ..backend import TorchBackend
from ..budget import Plan
from ..families.flux import FluxFamily
from ..models.flux import Flux, FluxConfig
from ..parts import Geometry
from ..routers.change import ChangeRouter
from ..routers.learned import LearnedRouter
from ..routers.token import CapacityTable, TokenScores
from ..runtime import Branches, Method, Run, running
from ..substitutes.history import Reuse
from ..substitutes.nothing import Nothing
from ..trace import Recorder
from .report import machine, table

WARM_UP = 2
STEPS = 20
_CPU_CONFIG = FluxConfig(depth=1, depth_single_blocks=2)
_CUDA_CONFIG = FluxConfig(guidance_embed=True)
_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu: full widths, 1 + 2 blocks; cuda: all of FLUX.1-dev (about 32 GB)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on CPU, bfloat16 elsewhere")
    parser.add_argument("--budgets", type=float, nargs="+", default=(0.9, 0.75, 0.5))
    parser.add_argument("--repetitions", type=int, default=5, help="evaluations measured per row")
    parser.add_argument("--quick", action="store_true", help="three repetitions at the lowest budget")


def run(args: argparse.Namespace) -> None:
    device = torch.device(args.device)
    cpu = device.type == "cpu"
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit("bench flux: there is no CUDA device here; leave --device out to measure on the CPU.")
    dtype = getattr(torch, args.dtype or ("float32" if cpu else "bfloat16"))
    budgets, repetitions = ([min(args.budgets)], 3) if args.quick else (args.budgets, args.repetitions)
    subject = Subject(_CPU_CONFIG if cpu else _CUDA_CONFIG, 32 if cpu else 64, 256, device, dtype)
    print(f"{machine(device)}\n{subject}")
    print(report(subject, budgets, repetitions), flush=True)


class Subject:
    """A FLUX with random weights on `side`² image tokens and `text` text tokens, batch 1; its latent follows sigma."""

    def __init__(self, config: FluxConfig, side: int, text: int, device: torch.device, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        self.config, self.grid, self.device, self.dtype = config, (side, side), device, dtype
        with _defaults(device, dtype):
            self.model = Flux(config).requires_grad_(False)
            latent = (1, config.in_channels, config.patch_size * side, config.patch_size * side)
            self.picture, self.noise = torch.randn(latent), torch.randn(latent)
            self.context, self.pooled = torch.randn(1, text, config.context_in_dim), torch.randn(1, config.vec_in_dim)
            self.guidance = torch.full((1,), 3.5) if config.guidance_embed else None
        self.family, self.backend = FluxFamily(), TorchBackend()
        self.geometry = Geometry(side * side, text, config.hidden_size, config.mlp_ratio)
        self.costs = self.family.costs(self.model, self.geometry, self.backend)
        self.block_flops = sum(cost.at(side * side) for cost in self.costs)

    def __str__(self) -> str:
        return (f"FLUX, width {self.config.hidden_size}, {self.config.depth} + {self.config.depth_single_blocks} blocks, "
                f"{self.geometry.image_tokens} + {self.geometry.text_tokens} tokens, {str(self.dtype)[6:]}")

    def prepare(self, sigma: float) -> Callable[[], Tensor]:
        """The model's own forward at `sigma`, its inputs ready on the device."""
        x, t = torch.lerp(self.picture, self.noise, sigma), torch.full((1,), sigma, device=self.device)
        return lambda: self.model(x, t, self.context, self.pooled, self.guidance)

    def passing(self, run: Run) -> AbstractContextManager[None]:
        return running(run, self.family, self.model, self.geometry, Branches.cond_only(1), 1, self.grid, self.backend)


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


@dataclass
class Lane:
    """One way to run the model: dense where `run` is None. `seconds` holds the measured evaluations."""

    name: str
    budget: float = 1.0
    run: Run | None = None
    seconds: list[float] = field(default_factory=list)

    def evaluate(self, subject: Subject, forward: Callable[[], Tensor], sigma: float) -> Tensor:
        if self.run is None:
            return forward()
        self.run.arrive(sigma)
        with subject.passing(self.run):
            return forward()


def methods(subject: Subject) -> dict[str, Method]:
    """A learned router with synthetic weights, whose blocks want different capacities, and the training-free method.

    The latter with every evaluation alike (`early=0`), so that the evaluations measured stand for the run.
    """
    blocks = len(subject.costs)
    with subject.device:
        scores = TokenScores(blocks, subject.config.hidden_size).requires_grad_(False)
    probabilities = torch.linspace(0, 1, 65).clamp(1e-4, 1 - 1e-4)
    wants = torch.linspace(-0.5, 0.5, blocks)[:, None, None]
    quantiles = (torch.special.ndtri(probabilities) + wants).expand(-1, 8, -1)
    learned = LearnedRouter(scores, CapacityTable(quantiles, torch.linspace(1 / 8, 1, 8)))
    return {"learned tokens, nothing": Method(learned, Nothing()), "changed tokens, reuse": Method(ChangeRouter(early=0.0), Reuse())}


def open_lanes(subject: Subject, budgets: Sequence[float], sigmas: Sequence[float]) -> list[Lane]:
    return [Lane("dense")] + [Lane(name, budget, Run(Plan(budget), method, sigmas, Recorder()))
                              for name, method in methods(subject).items() for budget in budgets]


def measure(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float]) -> None:
    """Every lane in turn at each sigma; wall-clock seconds around arrival, plan, forward and recording."""
    for sigma in sigmas:
        forward = subject.prepare(sigma)
        for lane in lanes:
            _wait(subject.device)
            start = time.perf_counter()
            lane.evaluate(subject, forward, sigma)
            _wait(subject.device)
            lane.seconds.append(time.perf_counter() - start)


def count(work: Callable[[], Tensor]) -> float:
    """FLOPs of `work`; torch's counter does not know the fused attention on CPU."""
    formula = {_CPU_ATTENTION: lambda q, k, v, *args, out_shape=None, **kwargs: sdpa_flop_count(q, k, v)}
    with FlopCounterMode(display=False, custom_mapping=formula) as counter:
        work()
    return counter.get_total_flops()


def warm_up(subject: Subject, lanes: Sequence[Lane], sigmas: Sequence[float]) -> list[float]:
    """Two evaluations of every lane, dense first, and the checks that need no clock.

    Returns the FLOPs counted in each lane's second one.
    """
    first, second = (subject.prepare(sigma) for sigma in sigmas)
    dense, counted = None, []
    for lane in lanes:
        output = lane.evaluate(subject, first, sigmas[0])
        dense = output if dense is None else dense
        if lane.run is None or lane.run.method.needs_history:  # every token was computed
            _check_same(lane.name, output, dense)
        with _no_waiting(subject.device):
            counted.append(count(lambda: lane.evaluate(subject, second, sigmas[1])))
    return counted


def _check_same(name: str, output: Tensor, dense: Tensor) -> None:
    if not torch.isfinite(dense).all():
        raise RuntimeError("The dense model's output is not finite; the measurement would mean nothing.")
    difference = float((output - dense).abs().max() / dense.abs().max())
    if difference > (1e-5 if dense.dtype == torch.float32 else 0.05):
        raise RuntimeError(f"{name} at full capacity differs from the model's own forward by {difference:.1e} of its largest value.")


@contextmanager
def _no_waiting(device: torch.device) -> Iterator[None]:
    """A forward that makes the CPU wait for the GPU raises inside."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Row:
    """Medians of one lane: `theory` and `speed_up` are against dense."""

    lane: Lane
    fraction: float
    seconds: float
    theory: float
    speed_up: float


def summarise(lane: Lane, spent: Sequence[float], counted: float, dense: Lane, dense_counted: float,
              block_flops: float) -> Row:
    """`spent`: fractions of dense block FLOPs that the lane booked, the warm-up's first; `counted` in the warm-up's last."""
    outside = dense_counted - block_flops
    booked = outside + spent[WARM_UP - 1] * block_flops
    if abs(counted / booked - 1) > 0.005:
        raise RuntimeError(f"{lane.name} at {lane.budget}: {counted:.4g} FLOPs were counted, {booked:.4g} booked.")
    fraction, seconds = mean(spent[WARM_UP:]), median(lane.seconds)
    theory = dense_counted / (outside + fraction * block_flops)
    return Row(lane, fraction, seconds, theory, median(dense.seconds) / seconds)


def report(subject: Subject, budgets: Sequence[float], repetitions: int) -> str:
    """Check, measure, and lay out as a table."""
    count_all = max(STEPS, WARM_UP + repetitions)
    sigmas = [1.0 - step / count_all for step in range(count_all)]
    lanes = open_lanes(subject, budgets, sigmas)
    try:
        with torch.inference_mode():
            counted = warm_up(subject, lanes, sigmas[:WARM_UP])
            measure(subject, lanes, sigmas[WARM_UP:WARM_UP + repetitions])
    finally:
        for lane in lanes[1:]:
            lane.run.finish()
            lane.run.recorder.finish()
    rows = []
    for lane, flops in zip(lanes, counted):
        spent = lane.run.ledger.spent if lane.run else [1.0] * (WARM_UP + repetitions)
        rows.append(summarise(lane, spent, flops, lanes[0], counted[0], subject.block_flops))
    return layout(rows)


def layout(rows: Sequence[Row]) -> str:
    heads = ("", "budget", "block FLOPs", "seconds", "speed-up", "in theory", "achieved")
    return table(heads, [
        (row.lane.name, f"{row.lane.budget:g}", f"{row.fraction:.3f}", f"{row.seconds:.4g}", f"{row.speed_up:.2f}",
         f"{row.theory:.2f}", f"{row.speed_up / row.theory:.0%}")
        for row in rows
    ])
