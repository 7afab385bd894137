"""What on a graph cannot be combined with token skipping, said before sampling starts. Each raises ValueError with a sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from torch import nn

from ..dydit_core.families.known import family_of
from ..dydit_core.models import dit
from ..dydit_core.regions import Regions
from .classes import NODE as CLASS_LABEL
from .classes import is_class
from .model import unwrapped

_REMEDY = "Take that node out, or set the budget to 1.0."
_KNOWN_FORWARDS = ("comfy.ldm.flux.layers", dit.__name__, "torch.nn.modules.container")
_TOKEN_CHANGERS = ("attn1_patch", "attn1_output_patch", "post_input")


def refuse(options: dict, patcher: Any) -> None:
    refuse_patches(options.get("transformer_options", {}))
    block = replaced_block(patcher)
    if block:
        raise ValueError(
            f"DyDiT Budget: another node replaced the forward of {block}, which token skipping would put aside. {_REMEDY}")
    if options.get("context_handler") is not None:
        raise ValueError("DyDiT Budget: a Context Windows node runs this picture window by window, and a budget is kept on whole pictures. "
                         f"{_REMEDY}")
    if patcher.get_additional_models_with_key("multigpu"):
        raise ValueError("DyDiT Budget: MultiGPU CFG Split runs the branches on several cards at once, and a budget is kept on one. "
                         f"{_REMEDY}")


def refuse_latent(model: nn.Module, shape: Sequence[int]) -> None:
    """A DiT, SiT or Latte says itself what it takes; before masks are held to a latent that is the wrong one."""
    reason = model.refusal(shape) if hasattr(model, "refusal") else None
    if reason is not None:
        raise ValueError(reason)


def refuse_masks(regions: Regions, latent_shape: Sequence[int]) -> None:
    """`latent_shape`: [rows, channels, height, width], or [rows, channels, frames, height, width]."""
    frames = prod(latent_shape[2:-2])
    held, what = latent_shape[0] * frames, "picture" if len(latent_shape) == 4 else "frame"
    for socket, mask in (("protect", regions.protect), ("prefer", regions.prefer)):
        if mask is not None and len(mask) not in (1, frames, held):
            raise ValueError(f"DyDiT Budget: {socket} holds {len(mask)} masks and the latent {held} {what}{'s' if held != 1 else ''}; "
                             "connect one mask for all of them, or one for each.")


def refuse_prompts(model: nn.Module, conds: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """`conds`: of each socket. A DiT holds its own to its classes; a FLUX would end in a product of matrices that do not fit."""
    width = getattr(getattr(model, "txt_in", None), "in_features", None)
    if width is None:
        return
    for socket, prompts in conds.items():
        for cond in prompts:
            context = cond.get("cross_attn")
            if context is None or context.shape[-1] == width:
                continue
            if is_class(cond):
                raise ValueError(f"DyDiT Budget: {socket} has a class, and this model draws prompts; take {CLASS_LABEL} out and connect a prompt.")
            raise ValueError(f"DyDiT Budget: {socket} has a prompt that was made for another model ({context.shape[-1]} numbers a token, "
                             f"and this one takes {width}); connect one from this model's own text encoder.")


def refuse_patches(transformer_options: dict) -> None:
    """They come from the MODEL, and by hooks from a prompt."""
    found = token_changers(transformer_options)
    if found:
        raise ValueError(
            f"DyDiT Budget: another node patches this model's attention or tokens ({found}), which cannot be "
            f"combined with token skipping yet. {_REMEDY}")


def token_changers(transformer_options: dict) -> str:
    """Names of the patches there that change attention or tokens; empty without any."""
    patches = transformer_options.get("patches", {})
    return ", ".join(name for name in _TOKEN_CHANGERS if patches.get(name))


def replaced_block(patcher: Any) -> str | None:
    """Name of a block, or of an MLP in it, that will run another forward than the host's, or None.

    The patcher is asked, not the module: what another clone of the MODEL patched is still there until this one is loaded.
    """
    model = unwrapped(patcher.get_model_object("diffusion_model"))
    restated = set(family_of(model).blocks(model))
    restated |= {module for block in restated for module in block.children() if isinstance(module, (nn.Sequential, dit.Mlp))}
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
