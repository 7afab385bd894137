"""What a training is about: encoded prompts or classes, and pictures where there are some; prompts are kept in a safetensors file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.files import bad, opened
from ..storage import write_atomically

FORMAT = "dydit-examples"
_CONTEXT, _EMPTY, _LATENTS = ("context", "pooled"), ("empty_context", "empty_pooled"), "latents"
_AGAIN = "make the file again with the DyDiT Save Examples node"


@dataclass(frozen=True)
class Examples:
    """`conditioning`: what the model is given, each [n, …]: of prompts context [n, tokens, dim] and pooled [n, dim], of classes their
    numbers [n]. `empty`: the same for no prompt or no class, each [1, …]. `latents` [n, C, H, W] of the pictures they belong to, in
    the model's own scale."""

    conditioning: tuple[Tensor, ...]
    empty: tuple[Tensor, ...]
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.conditioning[0])

    def given(self, index: Tensor) -> tuple[Tensor, ...]:
        """The conditioning of the examples `index` [rows], in float32 where it is no number of a class."""
        return tuple(part[index].float() if part.is_floating_point() else part[index] for part in self.conditioning)


def save_examples(path: Path, examples: Examples) -> None:
    """Of prompts: classes need no file."""
    tensors = {**dict(zip(_CONTEXT, examples.conditioning)), **dict(zip(_EMPTY, examples.empty))}
    if examples.latents is not None:
        tensors[_LATENTS] = examples.latents
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    write_atomically(path, lambda partial: save_file(tensors, partial, {"format": FORMAT}))


def load_examples(path: Path) -> Examples:
    """What `save_examples` wrote. Raises FileError."""
    with opened(path, "choose a file of encoded prompts", "choose the file that DyDiT Save Examples wrote") as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise bad(path, f"holds no encoded prompts (its metadata lacks format={FORMAT})", _AGAIN)
        found = {key: file.get_tensor(key).clone() for key in file.keys()}
    missing = [name for name in (*_CONTEXT, *_EMPTY) if name not in found]
    if missing:
        raise bad(path, f"lacks {missing[0]}", _AGAIN)
    examples = Examples(*(tuple(found[name] for name in names) for names in (_CONTEXT, _EMPTY)), found.get(_LATENTS))
    if not _fits(examples):
        raise bad(path, "has prompts and pictures of different numbers or sizes", _AGAIN)
    return examples


def _fits(examples: Examples) -> bool:
    (context, pooled), latents = examples.conditioning, examples.latents
    return (context.ndim == 3 and pooled.ndim == 2 and len(context) == len(pooled) > 0
            and [part.shape for part in examples.empty] == [(1, *part.shape[1:]) for part in examples.conditioning]
            and (latents is None or (latents.ndim == 4 and len(latents) == len(context)))
            and all(torch.isfinite(part.float()).all() for part in (context, pooled)))
