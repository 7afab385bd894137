"""What a training is about: encoded prompts, and pictures where there are some; kept in one safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.files import bad, opened
from ..storage import write_atomically

FORMAT = "dydit-examples"
_AGAIN = "make the file again with the DyDiT Save Examples node"


@dataclass(frozen=True)
class Examples:
    """`context` [n, tokens, dim] and `pooled` [n, dim] of the prompts, `empty_context` [1, …] and `empty_pooled` [1, …] of no
    prompt, as the model takes them; `latents` [n, C, H, W] of the pictures they belong to, in the model's own scale."""

    context: Tensor
    pooled: Tensor
    empty_context: Tensor
    empty_pooled: Tensor
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.context)

    @property
    def empty(self) -> tuple[Tensor, Tensor]:
        return self.empty_context, self.empty_pooled

    def prompts(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """(context, pooled) of the examples `index` [rows], in float32."""
        return self.context[index].float(), self.pooled[index].float()


def save_examples(path: Path, examples: Examples) -> None:
    tensors = {field.name: value.contiguous() for field in fields(examples) if (value := getattr(examples, field.name)) is not None}
    write_atomically(path, lambda partial: save_file(tensors, partial, {"format": FORMAT}))


def load_examples(path: Path) -> Examples:
    """What `save_examples` wrote. Raises FileError."""
    with opened(path, "choose a file of encoded prompts", "choose the file that DyDiT Save Examples wrote") as file:
        if (file.metadata() or {}).get("format") != FORMAT:
            raise bad(path, f"holds no encoded prompts (its metadata lacks format={FORMAT})", _AGAIN)
        found = {key: file.get_tensor(key).clone() for key in file.keys()}
    missing = [name for name in _required(found) if name not in found]
    if missing:
        raise bad(path, f"lacks {missing[0]}", _AGAIN)
    examples = Examples(**{field.name: found.get(field.name) for field in fields(Examples)})
    if not _fits(examples):
        raise bad(path, "has prompts and pictures of different numbers or sizes", _AGAIN)
    return examples


def _required(found: dict[str, Tensor]) -> Sequence[str]:
    return [field.name for field in fields(Examples) if field.name != "latents"]


def _fits(examples: Examples) -> bool:
    context, pooled, latents = examples.context, examples.pooled, examples.latents
    return (context.ndim == 3 and pooled.ndim == 2 and len(context) == len(pooled) > 0
            and examples.empty_context.shape == (1, *context.shape[1:]) and examples.empty_pooled.shape == (1, *pooled.shape[1:])
            and (latents is None or (latents.ndim == 4 and len(latents) == len(context)))
            and all(torch.isfinite(part.float()).all() for part in (context, pooled)))
