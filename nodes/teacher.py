"""A MODEL as training sees it: a frozen copy of its own, run as the host runs it, with gradients through its blocks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management
import comfy.samplers
import torch
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_sampling import CONST
from torch import Tensor, nn

from ..dydit_core.blocks import Pass
from ..dydit_core.families.flux import FluxFamily
from ..dydit_core.models.dit import DiT
from ..dydit_core.models.latte import Latte
from ..dydit_core.train.recompute import Recomputed
from ..dydit_core.train.teacher import Teacher
from .backend import ComfyBackend
from .examples import LATENT
from .model import image_tokens, unwrapped
from .refusals import replaced_block, token_changers

NODE = "DyDiT Train"
_FAMILY = FluxFamily()


class TrainingBackend(ComfyBackend):
    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict | None) -> Tensor:
        """By torch: the fast ones that a host may be started with have no gradient."""
        return attention_pytorch(q, k, v, q.shape[1], mask=mask, skip_reshape=True)


class TypedFamily(FluxFamily):
    def forward(self, block: nn.Module, index: int, current: Pass, backend: Any, *args: Any, **kwargs: Any) -> Any:
        """Blocks keep the type of the base around float32 gates."""
        like = kwargs["img"] if "img" in kwargs else args[0]
        out = super().forward(block, index, current, backend, *args, **kwargs)
        return tuple(part.to(like) for part in out) if isinstance(out, tuple) else out.to(like)


def refuse(model: Any) -> None:
    """Raise ValueError with a sentence where gates cannot be trained for this MODEL."""
    transformer = unwrapped(model.get_model_object("diffusion_model"))
    if isinstance(transformer, (DiT, Latte)):
        raise ValueError(f"{NODE}: gates for a {transformer.config.title} are trained in a shell: python -m dydit_core train --base FILE (docs/train.md of this pack).")
    reason = _FAMILY.refusal(transformer)
    if reason is None and not isinstance(model.get_model_object("model_sampling"), CONST):
        reason = "this model does not sample along a flow, as FLUX does"
    if reason is None and transformer.img_in.in_features != LATENT.latent_channels * transformer.patch_size**2:
        reason = f"{type(transformer).__name__} takes a second picture beside the noise (Fill, Canny, Depth)"
    if reason:
        raise ValueError(f"{NODE}: {reason}. It works on FLUX.1 models that draw from a prompt (dev, schnell, lite); connect one of those.")
    foreign = token_changers(model.model_options.get("transformer_options", {})) or replaced_block(model)
    if foreign or model.injections:
        where = foreign or "a LoRA that bypasses the weights"
        raise ValueError(f"{NODE}: another node works inside this model's layers ({where}), which training would not see; take that node out, "
                         "or load the LoRA with Load LoRA.")


def fits(model: Any, context: Tensor, pooled: Tensor) -> None:
    """Raise ValueError with a sentence where prompts [n, tokens, dim] and [n, dim] were encoded for another model."""
    transformer = unwrapped(model.get_model_object("diffusion_model"))
    takes, pools = transformer.txt_in.in_features, transformer.params.vec_in_dim
    if context.shape[-1] != takes or (pools and pooled.shape[-1] < pools):
        raise ValueError(f"{NODE}: positive was encoded for another model ({context.shape[-1]} and {pooled.shape[-1]} numbers a token and a prompt, this model takes "
                         f"{takes} and {pools}); use the text encoders that belong to it.")


def taught(model: Any, guidance: float) -> dict[str, str | float]:
    """How the base is run beside its weights (see `Job.taught`): guidance and shift."""
    middle = float(comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8)[4])
    return {"guidance": guidance, "shift": f"{middle:.4f} at half the steps"}


@contextmanager
def training() -> Iterator[None]:
    """Nodes run in inference mode, and the host has fast paths without a gradient: neither holds in here."""
    before = comfy.model_management.in_training
    with torch.inference_mode(False), torch.enable_grad():
        comfy.model_management.in_training = True
        try:
            yield
        finally:
            comfy.model_management.in_training = before


def teacher_of(model: Any, guidance: float, size: tuple[int, int, int], text_tokens: int, rows: int) -> Teacher:
    """Of a copy of MODEL with its LoRAs, loaded for `rows` rows of a latent of `size` (C, H, W). Call it while `training`.

    A copy, as the host's own training has: the artist's was made in inference mode, and may be cast and moved while it runs.
    """
    try:
        patcher = model.clone(disable_dynamic=True, force_deepcopy=True)
    except RuntimeError:
        raise ValueError(f"{NODE}: the loader of this model cannot make a copy of it; load the model with Load Diffusion Model or Load Checkpoint.") from None
    if patcher.model.get_dtype_inference() == torch.float16:
        patcher.set_model_compute_dtype(torch.bfloat16)  # small gradients are zero in float16
    patcher.model.requires_grad_(False)
    transformer, dtype = unwrapped(patcher.model.diffusion_model), patcher.model.get_dtype_inference()
    tokens = image_tokens(transformer, size, None) + text_tokens
    kept = 4 * rows * tokens * _FAMILY.sizes(transformer)[0] * dtype.itemsize * len(_FAMILY.blocks(transformer))
    # In full: a weight that streams through a buffer is another's by the time its gradient is computed.
    comfy.model_management.load_models_gpu([patcher], memory_required=3 * patcher.memory_required([rows, *size]) + kept, force_full_load=True)

    def schedule(steps: int) -> list[float]:
        return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps).tolist()

    half = half_products(patcher)
    # Computed again for the gradient: else every weight that the host casts for a call would be kept.
    family = Recomputed(_FAMILY if half else TypedFamily())
    return Teacher(transformer, family, TrainingBackend(), _velocity(patcher, guidance, half), schedule, transformer.patch_size, patcher.load_device)


def half_products(patcher: Any) -> bool:
    """A float32 base on a processor that multiplies bfloat16 itself, three times as fast: its matrix products are made so."""
    return (patcher.load_device.type == "cpu" and patcher.model.get_dtype_inference() == torch.float32
            and getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def _velocity(patcher: Any, guidance: float, half: bool) -> Any:
    base, device = patcher.model, patcher.load_device
    shared = {key: value for key, value in patcher.model_options.get("transformer_options", {}).items() if key != "optimized_attention_override"}

    def velocity(x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """As `BaseModel._apply_model` calls the transformer."""
        dtype = base.get_dtype_inference()
        x, context, pooled = (part.to(device, dtype) for part in (x, context, pooled))
        scale = torch.full((len(x),), guidance, device=device).to(dtype)
        options = {**shared, "sigmas": sigma, "cond_or_uncond": [0]}
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            return base.diffusion_model(x, base.model_sampling.timestep(sigma).float(), context=context, y=pooled, guidance=scale, transformer_options=options)

    return velocity
