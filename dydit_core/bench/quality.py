"""`bench quality`: what each method keeps of the dense picture, on held-out prompts of the demo model.

Every row starts from the same noise. PSNR is to the dense picture of the same number of steps; "fewer steps" is what
an artist gets for at most the same FLOPs without any of this, and "another seed" is the scale's zero.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..budget import Plan
from ..checkpoints.adapter import load_adapter
from ..compare import psnr
from ..demo.base import load_base
from ..demo.checker import Checker, accuracy, load_checker
from ..demo.files import BASE_FILE, CHECKER_FILE, VAE_FILE, WEIGHTS, adapter_file
from ..demo.heldout import held_out, held_out_prompts
from ..demo.prompt import encode_batch
from ..sampling import sample, sigmas
from ..demo.vae import decode, load_decoder
from ..models.flux import Flux
from ..routers.alternate import AlternateRouter
from ..routers.change import ChangeRouter
from ..routers.random import RandomRouter
from ..runtime import Method
from ..standalone import Budgeted
from ..substitutes.history import Reuse
from ..substitutes.nothing import Nothing
from .detail import detailed

NOISE_SEED, OTHER_SEED = 11, 12
# The demo's adapters, and what a table calls them.
ADAPTERS = {"sdt": "SDT", "sdt_tdw": "SDT+TDW", "sdt_tdw_tdlora": "SDT+TDW+TD-LoRA"}
ALLOWANCE = 0.02  # what a row may spend above what was asked and still be the best one


@dataclass(frozen=True)
class Row:
    """`spent` is the achieved budget; PSNR in dB, whole picture and detailed tokens; `accuracy` of the prompt, 0…1."""

    steps: int
    asked: float
    method: str
    spent: float
    psnr: float
    psnr_detail: float
    accuracy: float
    seconds: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompts", type=int, default=64, help="held-out prompts (default 64)")
    parser.add_argument("--steps", type=int, nargs="+", default=[4, 8, 20], help="sampling steps (default 4 8 20)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.9, 0.75, 0.5], help="budgets (default 0.9 0.75 0.5)")
    parser.add_argument("--cfg", type=float, default=2.0, help="guidance scale (default 2)")
    parser.add_argument("--bfloat16", action="store_true", help="matrix products in bfloat16, dense and ours alike: faster on a CPU that has it")
    parser.add_argument("--batch", type=int, default=16, help="prompts sampled together (default 16)")
    parser.add_argument("--only", nargs="+", help="rows whose name has one of these in it, beside dense (default: all)")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="folder of the demo's weights")
    parser.add_argument("--out", type=Path, help="write the table as Markdown here, and the rows as JSON beside it")


def run(args: argparse.Namespace) -> None:
    lab = Lab(args.weights, args.prompts, args.cfg, args.batch, args.bfloat16)
    rows = []
    for row in measure(lab, args.steps, args.budgets, args.only or [""]):
        rows.append(row)
        print(_line(row), flush=True)
    table = markdown(rows, args)
    print("\n" + table)
    if args.out:
        args.out.write_text(table)
        args.out.with_suffix(".json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


class Lab:
    """The demo model, its prompts and noise, and the checker."""

    def __init__(self, weights: Path, prompts: int, cfg: float, batch: int, bfloat16: bool = False) -> None:
        self.model: Flux = load_base(weights / BASE_FILE)
        self.decoder = load_decoder(weights / VAE_FILE)
        self.checker: Checker = load_checker(weights / CHECKER_FILE)
        self.routers = {name: load_adapter(weights / adapter_file(kind)).router for kind, name in ADAPTERS.items()}
        self.scenes = held_out(prompts)
        self.context, self.pooled = encode_batch(held_out_prompts(prompts))
        self.uncond = encode_batch([""])
        self.cfg, self.batch, self.bfloat16 = cfg, batch, bfloat16

    def noise(self, seed: int) -> Tensor:
        return torch.randn(len(self.scenes), 16, 32, 32, generator=torch.Generator().manual_seed(seed))

    @property
    def open(self) -> Method:
        """The low-rank additions alone: what they cost where nothing is skipped."""
        return Method(self.routers["SDT+TDW+TD-LoRA"].open, Nothing())

    def methods(self) -> dict[str, Method]:
        return {
            **{f"{name} × nothing": Method(router, Nothing()) for name, router in self.routers.items()},
            "TDW × nothing": Method(replace(self.routers["SDT+TDW"], scores=None, table=None), Nothing()),
            **{f"{name} × reuse": Method(router.for_reuse(), Reuse()) for name, router in self.routers.items()},
            "changed × reuse": Method(ChangeRouter(), Reuse()),
            "alternate steps × reuse": Method(AlternateRouter(), Reuse()),
            "random × nothing": Method(RandomRouter(), Nothing()),
            "random × reuse": Method(RandomRouter(), Reuse()),
        }

    def pictures(self, steps: int, method: Method | None = None, budget: float = 1.0, seed: int = NOISE_SEED) -> tuple[Tensor, float]:
        """Images [prompts, 3, 256, 256] and the budget they spent; dense without a method."""
        images, spent = [], []
        noise = self.noise(seed)
        for start in range(0, len(self.scenes), self.batch):
            rows = slice(start, start + self.batch)
            draw = partial(sample, context=self.context[rows], pooled=self.pooled[rows], noise=noise[rows], steps=steps,
                           cfg=self.cfg, uncond=self.uncond)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                if method is None:
                    latents = draw(self.model)
                    spent.append(1.0)
                else:
                    with Budgeted(self.model, Plan(budget), method, sigmas(steps)) as budgeted:
                        latents = draw(budgeted)
                    spent.append(budgeted.spent.achieved)
            images.append(decode(latents, self.decoder))
        return torch.cat(images), sum(spent) / len(spent)

    def accuracy(self, images: Tensor) -> float:
        return accuracy(images, self.scenes, self.checker)["mean"]


@torch.no_grad()
def measure(lab: Lab, steps: list[int], budgets: list[float], only: Sequence[str] = ("",)) -> Iterator[Row]:
    """The rows that have one of `only` in their name, as they are measured."""
    for count in steps:
        start = time.perf_counter()
        dense, _ = lab.pictures(count)
        seconds = time.perf_counter() - start
        detail = detailed(dense)
        yield Row(count, 1.0, "dense", 1.0, float("inf"), float("inf"), lab.accuracy(dense), seconds / len(dense))
        for asked, name, draw in _jobs(lab, count, budgets):
            if any(word in name for word in only):
                start = time.perf_counter()
                images, spent = draw()
                took = (time.perf_counter() - start) / len(images)
                yield Row(count, asked, name, spent, psnr(images, dense), psnr(images, dense, detail), lab.accuracy(images), took)


def _jobs(lab: Lab, steps: int, budgets: list[float]) -> Iterator[tuple[float, str, Callable[[], tuple[Tensor, float]]]]:
    """Asked budget, name, and what draws the pictures of each row."""
    yield 1.0, "dense, another seed", partial(lab.pictures, steps, seed=OTHER_SEED)
    yield 1.0, "TD-LoRA, every gate open", partial(lab.pictures, steps, lab.open)
    for budget in budgets:
        for name, method in lab.methods().items():
            yield budget, name, partial(lab.pictures, steps, method, budget)
        fewer = max(1, int(budget * steps + 1e-9))
        yield budget, f"fewer steps ({fewer})", lambda: (lab.pictures(fewer)[0], fewer / steps)


def _line(row: Row) -> str:
    return (f"{row.steps:>3} steps  asked {row.asked:.2f}  spent {row.spent:.3f}  {row.method:<26} PSNR {row.psnr:6.2f}  "
            f"detail {row.psnr_detail:6.2f}  accuracy {row.accuracy:.3f}  {row.seconds:.2f} s")


def markdown(rows: list[Row], args: argparse.Namespace) -> str:
    """One table per number of steps."""
    parts = [f"{args.prompts} held-out prompts, Euler, cfg {args.cfg:g}, {'bfloat16' if args.bfloat16 else 'float32'} products; PSNR in dB to the dense picture of the same number of "
             "steps, whole and on detailed tokens; accuracy of the prompt by the checker.\n"]
    for steps in dict.fromkeys(row.steps for row in rows):
        parts.append(f"\n### {steps} steps\n\n| asked | method | spent | PSNR | PSNR, detail | accuracy |\n|---|---|---|---|---|---|")
        for row in (row for row in rows if row.steps == steps):
            mark = "**" if _is_best(row, rows) else ""
            parts.append(f"| {row.asked:g} | {mark}{row.method}{mark} | {row.spent:.3f} | {_db(row.psnr)} | {_db(row.psnr_detail)} | {row.accuracy:.1%} |")
    return "\n".join(parts) + "\n"


def _is_best(row: Row, rows: list[Row]) -> bool:
    """Nearest to dense among those that kept to the budget: a row at a floor above it has bought its likeness."""
    rivals = [other for other in rows if (other.steps, other.asked) == (row.steps, row.asked) and other.spent <= other.asked + ALLOWANCE]
    return row.asked < 1 and row in rivals and row.psnr == max(other.psnr for other in rivals)


def _db(value: float) -> str:
    return "same" if value == float("inf") else f"{value:.1f}"
