"""A LoRA on linear layers of a FLUX, kept in a file that ComfyUI's own "Load LoRA" node takes.

    W x + up (down x)

The file holds no `alpha`, so nothing is scaled: strength 1.0 is what was trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from .storage import write_atomically

# ComfyUI (comfy/lora.py) finds a layer of any model under this and the layer's own name.
PREFIX, DOWN, UP = "diffusion_model.", ".lora_down.weight", ".lora_up.weight"


class LoRA(nn.Module):
    """`down` [rank, inputs] and `up` [outputs, rank] by the name that the layer has in the model."""

    def __init__(self, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.names = tuple(factors)
        self.down = nn.ParameterList([down for down, _ in factors.values()])
        self.up = nn.ParameterList([up for _, up in factors.values()])

    def factors(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(name, down, up) of every layer."""
        return zip(self.names, self.down, self.up)

    @contextmanager
    def beside(self, model: nn.Module) -> Iterator[None]:
        """Run next to the layers of `model`, whose weights stay as they are."""
        with ExitStack() as stack:
            for name, down, up in self.factors():
                stack.enter_context(_added(model.get_submodule(name), down, up))
            yield


@contextmanager
def _added(layer: nn.Module, down: Tensor, up: Tensor) -> Iterator[None]:
    def add(_: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        return output + F.linear(F.linear(inputs[0], down), up)

    handle = layer.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def new_lora(model: nn.Module, rank: int) -> LoRA:
    """Untrained, on every linear layer of `model`; it adds nothing yet."""
    factors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            width = min(rank, layer.in_features, layer.out_features)
            down = torch.randn(width, layer.in_features) * layer.in_features**-0.5
            factors[name] = down, torch.zeros(layer.out_features, width)
    return LoRA(factors)


@torch.no_grad()
def merge(model: nn.Module, lora: LoRA) -> None:
    """Add `lora` to the weights of `model`, as the host does."""
    for name, down, up in lora.factors():
        weight = model.get_submodule(name).weight
        weight += (up @ down).to(weight)


def save_lora(path: Path, lora: LoRA, metadata: dict[str, str]) -> None:
    """In half precision."""
    tensors = {}
    for name, down, up in lora.factors():
        tensors[f"{PREFIX}{name}{DOWN}"], tensors[f"{PREFIX}{name}{UP}"] = down, up
    half = {key: value.detach().half().contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda partial: save_file(half, partial, metadata))


def load_lora(path: Path) -> LoRA:
    """What `save_lora` wrote."""
    tensors = {key: value.float() for key, value in load_file(path).items()}
    names = [key[len(PREFIX) : -len(DOWN)] for key in tensors if key.endswith(DOWN)]
    factors = {name: (tensors[f"{PREFIX}{name}{DOWN}"], tensors[f"{PREFIX}{name}{UP}"]) for name in names}
    return LoRA(factors).requires_grad_(False)
