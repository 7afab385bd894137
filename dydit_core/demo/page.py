"""`demo`: the demo model at several budgets from the same noise, as one self-contained HTML page."""

from __future__ import annotations

import argparse
import base64
import html
import io
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..budget import Plan
from ..checkpoints.adapter import load_adapter
from ..colours import cividis
from ..compare import psnr
from ..methods import AUTO, resolve
from ..models.flux import Flux
from ..standalone import Budgeted, Spent
from .base import load_base
from .files import ADAPTER_FILE, BASE_FILE, VAE_FILE, WEIGHTS
from .prompt import VOCABULARY, encode, encode_batch
from ..sampling import sample, sigmas
from .vae import decode, load_decoder

PROMPTS = (
    "a red house on the left and a yellow balloon on the right, meadow, day, clouds",
    "a red sailboat on the left and a white lighthouse on the right, sea, sunset",
    "a white castle in the center, snow, night, stars",
)
BUDGETS = (1.0, 0.75, 0.5, 0.35)


@dataclass(frozen=True)
class Shot:
    """One picture [3, H, W] in 0…1, what it cost, and the mean map of computed tokens [rows, columns]."""

    budget: float
    image: Tensor
    tokens: np.ndarray
    achieved: float
    seconds: float
    psnr: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("dydit_demo.html"), help="page to write (default dydit_demo.html)")
    parser.add_argument("--prompt", action="append", help="your own prompt; may be given several times")
    parser.add_argument("--steps", type=int, default=20, help="sampling steps (default 20)")
    parser.add_argument("--cfg", type=float, default=2.0, help="guidance scale (default 2)")
    parser.add_argument("--seed", type=int, default=7, help="seed of the noise (default 7)")


def run(args: argparse.Namespace) -> None:
    prompts = tuple(args.prompt or PROMPTS)
    if unknown := [word for prompt in prompts for word in encode(prompt).unknown_words]:
        raise SystemExit(f"The demo model does not know: {', '.join(unknown)}. Its words: {', '.join(VOCABULARY[1:])}.")
    print("Loading the demo model …", flush=True)
    studio = Studio(WEIGHTS, args.steps, args.cfg, args.seed)
    progress = Progress(len(prompts) * len(BUDGETS) * args.steps)
    studio.warm_up()
    rows = [(prompt, studio.shots(prompt, progress)) for prompt in prompts]
    args.out.write_text(page(rows, studio), encoding="utf-8")
    print(f"\nOpen {args.out.resolve()} in a browser.")


class Progress:
    """A bar on one line of the terminal."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0

    def step(self, *_: object) -> None:
        self.done += 1
        filled = 30 * self.done // self.total
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {self.done}/{self.total} evaluations", end="", flush=True)


class Studio:
    """The demo model with all it needs to draw a prompt."""

    def __init__(self, weights: Path, steps: int, cfg: float, seed: int) -> None:
        self.steps, self.cfg, self.seed = steps, cfg, seed
        self.model: Flux = load_base(weights / BASE_FILE)
        self.decoder = load_decoder(weights / VAE_FILE)
        adapter = load_adapter(weights / ADAPTER_FILE)
        self.name, self.substitute, self.method = resolve(AUTO, AUTO, adapter.router)

    def warm_up(self) -> None:
        """First calls allocate; the seconds on the page should not hold that."""
        context, pooled = encode_batch([PROMPTS[0]])
        with torch.no_grad():
            self.model(torch.zeros(1, 16, 32, 32), torch.ones(1), context, pooled)

    def shots(self, prompt: str, progress: Progress) -> list[Shot]:
        """The prompt at every budget; the first, dense one is what the others are held to."""
        context, pooled = encode_batch([prompt])
        noise = torch.randn(1, 16, 32, 32, generator=torch.Generator().manual_seed(self.seed))
        shots: list[Shot] = []
        for budget in BUDGETS:
            start = time.perf_counter()
            latents, spent = self._sample(budget, context, pooled, noise, progress)
            seconds = time.perf_counter() - start
            image = decode(latents, self.decoder)[0].detach()
            tokens = np.mean([evaluation.mean_map() for evaluation in spent.evaluations], axis=0) if spent else np.ones((16, 16))
            likeness = psnr(image[None], shots[0].image[None]) if shots else float("inf")
            shots.append(Shot(budget, image, tokens, spent.achieved if spent else 1.0, seconds, likeness))
        return shots

    def _sample(self, budget: float, context: Tensor, pooled: Tensor, noise: Tensor, progress: Progress) -> tuple[Tensor, Spent | None]:
        uncond = encode_batch([""])
        if budget >= 1.0:
            def dense(x: Tensor, sigma: Tensor, c: Tensor, y: Tensor) -> Tensor:
                if c is context:
                    progress.step()
                return self.model(x, sigma, c, y)

            return sample(dense, (context, pooled), noise, self.steps, self.cfg, uncond), None
        with Budgeted(self.model, Plan(budget), self.method, sigmas(self.steps), progress.step) as budgeted:
            latents = sample(budgeted, (context, pooled), noise, self.steps, self.cfg, uncond)
        return latents, budgeted.spent


def colored(tokens: np.ndarray) -> np.ndarray:
    """Bytes [rows, columns, 3] of fractions 0…1 in cividis."""
    return (cividis(torch.from_numpy(tokens)) * 255).round().byte().numpy()


def _data_url(pixels: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _percent(share: float, digits: int = 0) -> str:
    return f"{100 * share:.{digits}f}\u00a0%"


def _figure(shot: Shot) -> str:
    picture = (shot.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    dense = shot.budget >= 1
    title = "dense" if dense else f"budget {_percent(shot.budget)}"
    facts = [
        f"spent {_percent(shot.achieved, 1)}{' (the floor)' if shot.achieved > shot.budget + 0.02 else ''}",
        f"{_percent(shot.tokens.mean())} of tokens computed",
        "what the others are held to" if dense else f"{shot.psnr:.1f} dB to dense",
        f"{shot.seconds:.2f} s",
    ]
    return (f"<figure><img src='{_data_url(picture)}' alt='picture, {title}'>"
            f"<img class=map src='{_data_url(colored(shot.tokens))}' alt='map of computed tokens, {title}'>"
            f"<figcaption><b>{title}</b><br>{'<br>'.join(facts)}</figcaption></figure>")


_STYLE = """:root{color-scheme:light dark;--text:light-dark(#1b1d22,#e6e6e6);--quiet:light-dark(#555a63,#b4b8c0)}
body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:1180px;padding:0 1rem;
background:light-dark(#fafafa,#16181d);color:var(--text)}p{max-width:52rem}
h2{font-size:1.05rem;font-weight:600;margin:2rem 0 .5rem}.row{display:grid;grid-template-columns:repeat(4,1fr);gap:1rem}
@media(max-width:700px){.row{grid-template-columns:1fr 1fr}}
figure{margin:0}img{width:100%;display:block;border-radius:6px}.map{image-rendering:pixelated;margin-top:6px}
figcaption{font-size:.85rem;color:var(--quiet);margin-top:.4rem;font-variant-numeric:tabular-nums}b{color:var(--text)}
.legend{white-space:nowrap}.bar{height:10px;width:180px;display:inline-block;border-radius:4px;vertical-align:middle;margin:0 .5rem;
background:linear-gradient(90deg,#00204c,#39486b,#707073,#a79c75,#ffe945)}"""


def page(rows: list[tuple[str, list[Shot]]], studio: Studio) -> str:
    """The whole page; pictures are inside it."""
    body = "".join(f"<h2>{html.escape(prompt)}</h2><div class=row>{''.join(map(_figure, shots))}</div>" for prompt, shots in rows)
    return (f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
            f"<title>DyDiT: one slider</title><style>{_STYLE}</style><h1>One model, four budgets, the same noise</h1>"
            f"<p>{studio.steps} Euler steps, cfg {studio.cfg:g}, {html.escape(studio.name)} × {html.escape(studio.substitute)}. "
            f"<b>Budget</b> and <b>spent</b> are shares of the FLOPs that the transformer's blocks take when every token is "
            f"computed; what is always computed sets a floor. <b>dB</b> is likeness to the dense picture (PSNR): more is closer. "
            f"Seconds are of this machine; so small a model saves less time than FLOPs.</p>"
            f"<p>Under each picture, the share of blocks and steps in which each of its tokens was computed: "
            f"<span class=legend>{_percent(0)}<span class=bar></span>{_percent(1)}</span></p>{body}</html>\n")
