"""DiT and SiT as a MODEL, which the host has no class for: its config, the network as the host calls it, and its conditioning.

On the host's side it is a model like any other: schedulers, previews, LoRAs, partial loading and fp8 weights are the host's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import comfy.latent_formats
import comfy.model_management
import comfy.model_patcher
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.conds import CONDRegular
from comfy.model_base import BaseModel, ModelType
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_all_wrappers
from torch import Tensor, nn

from ..dydit_core.models.dit import FIRST_BETA, FLOW, LAST_BETA, STEPS, DiT, DiTConfig
from .backend import ComfyBackend
from .classes import labels_of

# The host's estimate for PixArt, which is built of the same blocks in this width.
_MEMORY, _MEMORY_WIDTH = 0.5, 1152
# "sqrt_linear" is the host's name for betas that rise in a straight line; "linear" are their roots.
_EPS_SAMPLING = {"beta_schedule": "sqrt_linear", "linear_start": FIRST_BETA, "linear_end": LAST_BETA, "timesteps": STEPS}


class HostedDiT(DiT):
    """The network as the host calls it; its answer is d x / d sigma, which the host takes for noise (EPS) or velocity (FLOW)."""

    def __init__(self, config: DiTConfig, interpolate: bool, image_model: str, dtype: torch.dtype, **made: Any) -> None:
        super().__init__(config, attention=ComfyBackend().attention, interpolate=interpolate, dtype=dtype, **made)
        self.dtype = dtype
        # Looked up and never multiplied, so nothing is gained by fp8, in which near places would become the same.
        self.pos_embed = nn.Parameter(self.pos_embed.float(), requires_grad=False)
        self.y_embedder.float()

    def forward(self, x: Tensor, time: Tensor, labels: Tensor, transformer_options: dict | None = None, context: Any = None,
                control: Any = None) -> Tensor:
        if control is not None:
            raise ValueError(f"This {self.config.title} has no ControlNets; take the ControlNet out of its conditioning.")
        options = transformer_options or {}
        wrapped = WrapperExecutor.new_class_executor(self._direction, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options))
        return wrapped.execute(x, time, labels, transformer_options=options)

    def _direction(self, x: Tensor, time: Tensor, labels: Tensor, transformer_options: dict) -> Tensor:
        out = super().forward(x, time, labels, transformer_options)[:, : self.config.in_channels]
        return -out if self.config.prediction == FLOW else out


class _Config(comfy.supported_models_base.BASE):
    unet_config = {"image_model": "dit"}
    unet_extra_config: dict[str, Any] = {}
    latent_format = comfy.latent_formats.SD15

    def __init__(self, config: DiTConfig, interpolate: bool, class_names: Sequence[str]) -> None:
        super().__init__({**self.unet_config, "config": config, "interpolate": interpolate})
        self.flow, self.class_names = config.prediction == FLOW, tuple(class_names)
        self.sampling_settings = {"shift": 1.0} if self.flow else dict(_EPS_SAMPLING)
        self.memory_usage_factor = _MEMORY * config.hidden_size / _MEMORY_WIDTH

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> DiTModel:
        return DiTModel(self, device)


class DiTModel(BaseModel):
    def __init__(self, model_config: _Config, device: Any = None) -> None:
        kind = ModelType.FLOW if model_config.flow else ModelType.EPS
        super().__init__(model_config, kind, device=device, unet_model=HostedDiT)
        self.class_names = model_config.class_names

    def process_timestep(self, timestep: Tensor, **kwargs: Any) -> Tensor:
        """SiT's time runs from noise to picture; the nodes that shift a schedule count it in different multiples."""
        if not self.model_config.flow:
            return timestep
        return 1.0 - timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def extra_conds(self, **kwargs: Any) -> dict[str, CONDRegular]:
        labels = labels_of(kwargs, self.diffusion_model.config, self.class_names)
        return {"labels": CONDRegular(labels.to(kwargs["device"]))}


def dit_model(config: DiTConfig, tensors: dict[str, Tensor], class_names: Sequence[str] = (), interpolate: bool = False,
              disable_dynamic: bool = False) -> Any:
    """The MODEL of these weights, in the type and on the device that the host chooses.

    `class_names`: those of a file that has its own; a model of 1000 classes without any draws ImageNet's. Raises ValueError
    for a network that does not work in the latent space of Stable Diffusion 1.
    """
    channels = comfy.latent_formats.SD15.latent_channels
    if config.in_channels != channels:
        raise ValueError(f"This {config.title} draws in {config.in_channels} channels, and ComfyUI's latents for it have {channels}; choose a file made for Stable "
                         "Diffusion's VAE.")
    host, device = _Config(config, interpolate, class_names), comfy.model_management.get_torch_device()
    supported = host.supported_inference_dtypes
    dtype = comfy.model_management.unet_dtype(model_params=comfy.utils.calculate_parameters(tensors), supported_dtypes=supported,
                                              weight_dtype=comfy.utils.weight_dtype(tensors))
    host.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    model, offload = host.get_model(tensors), comfy.model_management.unet_offload_device()
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    model.to(offload)
    model.load_model_weights(dict(tensors), assign=patcher.is_dynamic())
    return patcher
