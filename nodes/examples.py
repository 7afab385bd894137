"""Prompts and pictures of a graph as training takes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.latent_formats
import torch
from torch import Tensor

from ..dydit_core.train.examples import Examples

LATENT = comfy.latent_formats.Flux()
GUIDANCE = 3.5  # what the host gives a FLUX whose prompt says nothing of it
_FOREIGN = ("control", "hooks", "area", "mask", "reference_latents", "concat_latent_image", "attention_mask")


@dataclass(frozen=True)
class Prompt:
    """`context` [tokens, dim] and `pooled` [dim] of one prompt, and the `guidance` that goes with it."""

    context: Tensor
    pooled: Tensor
    guidance: float


@dataclass(frozen=True)
class Gathered:
    """`guidance` of all prompts; `notes`: sentences on what was left out."""

    examples: Examples
    guidance: float
    notes: tuple[str, ...] = ()


def gather(node: str, positive: Sequence[list], negative: Sequence[list] | None, latents: Sequence[dict] | None) -> Gathered:
    """What came through these sockets of `node`, each a list; raises ValueError with a sentence. Call it outside inference mode."""
    prompts, pictures = list(_prompts(node, "positive", positive)), _pictures(node, latents)
    if not prompts:
        raise ValueError(f"{node}: positive holds no prompt; connect DyDiT Prompts with at least one line, or CLIP Text Encode.")
    if pictures is not None and len(prompts) == 1:
        prompts *= len(pictures)
    if pictures is not None and len(prompts) != len(pictures):
        raise ValueError(f"{node}: positive holds {len(prompts)} prompts and latents {len(pictures)} pictures; connect one prompt for each picture, "
                         "one for all of them, or no latents.")
    guidances = sorted({prompt.guidance for prompt in prompts})
    if len(guidances) > 1:
        raise ValueError(f"{node}: the prompts of positive have different guidance ({guidances[0]:g} to {guidances[-1]:g}); use one Flux Guidance for all of them.")
    tokens = Counter(len(prompt.context) for prompt in prompts).most_common(1)[0][0]
    kept = [place for place, prompt in enumerate(prompts) if len(prompt.context) == tokens]
    left = len(prompts) - len(kept)
    notes = (f"{left} of {len(prompts)} prompts are left out: they have more or fewer than {tokens} text tokens, and a batch needs one length.",)
    context, pooled = (torch.stack([getattr(prompts[place], part) for place in kept]) for part in ("context", "pooled"))
    empty = _empty(node, list(_prompts(node, "negative", negative or [])), context, pooled)
    return Gathered(Examples((context, pooled), empty, None if pictures is None else pictures[kept]), guidances[0], notes if left else ())


def _prompts(node: str, socket: str, conditionings: Sequence[list]) -> Iterator[Prompt]:
    """Of a list of CONDITIONING, each of which is a list of [tensor, facts] too."""
    for context, facts in (entry for conditioning in conditionings for entry in conditioning):
        foreign = [name for name in _FOREIGN if facts.get(name) is not None]
        if foreign:
            raise ValueError(f"{node}: {socket} carries more than a prompt ({', '.join(foreign)}), which training does not take; connect the plain prompt.")
        pooled = facts.get("pooled_output")
        if context.ndim != 3 or pooled is None:
            raise ValueError(f"{node}: {socket} is no prompt for FLUX (it lacks the pooled text); encode it with the text encoders of the model.")
        for row in range(len(context)):
            yield Prompt(_own(context[row]), _own(pooled[row % len(pooled)]), float(facts.get("guidance", GUIDANCE)))


def _own(tensor: Any) -> Tensor:
    """A float32 copy on the CPU that autograd may keep: what nodes hand on was made in inference mode."""
    return tensor.detach().float().cpu().clone()


def _pictures(node: str, latents: Sequence[dict] | None) -> Tensor | None:
    """[pictures, C, H, W] in the model's scale."""
    if not latents:
        return None
    samples = [latent["samples"] for latent in latents]
    if any(part.ndim != 4 or part.shape[1] != LATENT.latent_channels for part in samples):
        raise ValueError(f"{node}: latents are not of a FLUX VAE ({LATENT.latent_channels} channels); encode the pictures with the VAE of the model.")
    sizes = sorted({tuple(part.shape[-2:]) for part in samples})
    if len(sizes) > 1:
        raise ValueError(f"{node}: latents come in {len(sizes)} sizes (the first {sizes[0][1] * 8} × {sizes[0][0] * 8} pixels); a training takes one: scale or crop the pictures alike.")
    return LATENT.process_in(_own(torch.cat(samples)))


def _empty(node: str, negative: list[Prompt], context: Tensor, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """Of no prompt, [1, tokens, dim] and [1, dim]; zeros where nothing is connected."""
    if not negative:
        return torch.zeros_like(context[:1]), torch.zeros_like(pooled[:1])
    found = negative[0]
    if found.context.shape != context.shape[1:] or found.pooled.shape != pooled.shape[1:]:
        raise ValueError(f"{node}: negative has {len(found.context)} text tokens and the prompts {context.shape[1]}; encode both with the same text encoders, "
                         "or disconnect negative.")
    return found.context[None], found.pooled[None]
