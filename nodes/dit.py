"""DiT, SiT and Latte as a MODEL, which the host has no class for: its config, the network as the host calls it, and its conditioning.

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
from torch import Tensor

from ..dydit_core.models.dit import FIRST_BETA, FLOW, LAST_BETA, STEPS, DiT, DiTConfig
from ..dydit_core.models.latte import Latte, LatteConfig
from .backend import ComfyBackend
from .classes import labels_of

# The host's estimate for PixArt, which is built of the same blocks in this width.
_MEMORY, _MEMORY_WIDTH = 0.5, 1152
# "sqrt_linear" is the host's name for betas that rise in a straight line; "linear" are their roots.
_EPS_SAMPLING = {"beta_schedule": "sqrt_linear", "linear_start": FIRST_BETA, "linear_end": LAST_BETA, "timesteps": STEPS}


_LOOKED_UP = ("pos_embed", "temp_embed", "y_embedder.")


class _Hosted:
    """The network as the host calls it; its answer is d x / d sigma, which the host takes for noise (EPS) or velocity (FLOW)."""

    def __init__(self, config: DiTConfig, image_model: str, dtype: torch.dtype, **made: Any) -> None:
        super().__init__(config, attention=ComfyBackend().attention, dtype=dtype, **made)
        self.dtype = dtype
        self.keep_types()

    def keep_types(self) -> None:
        """What is looked up is never multiplied: nothing is gained there by fp8, in which near places would become the same."""
        for name, values in self.named_parameters():
            values.data = values.data.to(torch.float32 if name.startswith(_LOOKED_UP) else self.dtype)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor | None = None, transformer_options: dict | None = None,
                context: Any = None, control: Any = None) -> Tensor:
        if control is not None:
            raise ValueError(f"This {self.config.title} has no ControlNets; take the ControlNet out of its conditioning.")
        options = transformer_options or {}
        wrapped = WrapperExecutor.new_class_executor(self._direction, self, get_all_wrappers(WrappersMP.DIFFUSION_MODEL, options))
        return wrapped.execute(x, time, labels, transformer_options=options)

    def _direction(self, x: Tensor, time: Tensor, labels: Tensor | None, transformer_options: dict) -> Tensor:
        out = super().forward(x, time, labels, transformer_options)[:, : self.config.in_channels]
        return -out if self.config.prediction == FLOW else out


class HostedDiT(_Hosted, DiT):
    pass


class HostedLatte(_Hosted, Latte):
    pass


class FramesSD15(comfy.latent_formats.SD15):
    """Every frame in the latent space of Stable Diffusion 1. The host previews the first frame."""

    latent_dimensions = 3

    def __init__(self) -> None:
        super().__init__()
        self.taesd_decoder_name = None  # the host would hand it all frames as one picture


class _Config(comfy.supported_models_base.BASE):
    """`choices`: what the network is made with beside its config."""

    unet_config = {"image_model": "dit"}
    unet_extra_config: dict[str, Any] = {}
    latent_format, network = comfy.latent_formats.SD15, HostedDiT

    def __init__(self, config: DiTConfig, class_names: Sequence[str], **choices: Any) -> None:
        super().__init__({**self.unet_config, "config": config, **choices})
        self.flow, self.class_names = config.prediction == FLOW, tuple(class_names)
        self.sampling_settings = {"shift": 1.0} if self.flow else dict(_EPS_SAMPLING)
        self.memory_usage_factor = _MEMORY * config.hidden_size / _MEMORY_WIDTH

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> DiTModel:
        return DiTModel(self, device)


class _LatteConfig(_Config):
    unet_config = {"image_model": "latte"}
    latent_format, network = FramesSD15, HostedLatte


class DiTModel(BaseModel):
    def __init__(self, model_config: _Config, device: Any = None) -> None:
        kind = ModelType.FLOW if model_config.flow else ModelType.EPS
        super().__init__(model_config, kind, device=device, unet_model=model_config.network)
        self.class_names = model_config.class_names

    def process_timestep(self, timestep: Tensor, **kwargs: Any) -> Tensor:
        """SiT's time runs from noise to picture; the nodes that shift a schedule count it in different multiples."""
        if not self.model_config.flow:
            return timestep
        return 1.0 - timestep / getattr(self.model_sampling, "multiplier", 1.0)

    def apply_model(self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Tensor | None = None, control: Any = None,
                    transformer_options: dict | None = None, **kwargs: Any) -> Tensor:
        """Refuses what would change nothing. Here and not in the network, since a compiled one does not look into these options again."""
        options = transformer_options or {}
        found = ", ".join(_patches(options))
        if found:
            raise ValueError(f"This {self.diffusion_model.config.title} has no place for patches of its blocks or attention, and another node sets some ({found}); "
                             "take that node out (Skip Layer Guidance, Perturbed-Attention Guidance, HyperTile or the like).")
        return super().apply_model(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def extra_conds(self, **kwargs: Any) -> dict[str, CONDRegular]:
        if not self.diffusion_model.config.classes:
            return {}  # it draws what it likes
        labels = labels_of(kwargs, self.diffusion_model.config, self.class_names)
        return {"labels": CONDRegular(labels.to(kwargs["device"]))}


def _patches(options: dict) -> list[str]:
    """Names of the patches in the host's options: `attn1_patch`, of those that replace `dit single_block`, and `rope_options`."""
    replaced = {f"{kind} {place[0]}": None for kind, of_kind in options.get("patches_replace", {}).items() for place in of_kind}
    patched = [name for name, patches in options.get("patches", {}).items() if patches]
    return [*patched, *replaced, *({"rope_options"} & options.keys())]


def dit_model(config: DiTConfig, tensors: dict[str, Tensor], class_names: Sequence[str] = (), interpolate: bool = False,
              disable_dynamic: bool = False) -> Any:
    """The MODEL of these weights, in the type and on the device that the host chooses.

    `class_names`: those of a file that has its own; a model of 1000 classes without any draws ImageNet's. `interpolate`:
    other sizes than a DiT was made for. Raises ValueError for a network that does not work in the latent space of Stable
    Diffusion 1, and for a Latte with `interpolate`.
    """
    channels = comfy.latent_formats.SD15.latent_channels
    if config.in_channels != channels:
        raise ValueError(f"This {config.title} draws in {config.in_channels} channels, and ComfyUI's latents for it have {channels}; choose a file made for Stable "
                         "Diffusion's VAE.")
    if isinstance(config, LatteConfig):
        if interpolate:
            raise ValueError(f"This {config.title} draws in the size it was made for alone; turn interpolate_positions off.")
        host = _LatteConfig(config, class_names)
    else:
        host = _Config(config, class_names, interpolate=interpolate)
    device = comfy.model_management.get_torch_device()
    supported = host.supported_inference_dtypes
    dtype = comfy.model_management.unet_dtype(model_params=comfy.utils.calculate_parameters(tensors), supported_dtypes=supported,
                                              weight_dtype=comfy.utils.weight_dtype(tensors))
    host.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, device, supported))
    model, offload = host.get_model(tensors), comfy.model_management.unet_offload_device()
    kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
    patcher = kind(model, load_device=device, offload_device=offload)
    if not comfy.model_management.is_device_cpu(offload):
        model.to(offload)
    model.load_model_weights(dict(tensors), assign=patcher.is_dynamic())
    if not patcher.is_dynamic():
        # The layers that the host makes under DynamicVRAM take on the file's type, and only a dynamic patcher casts them.
        model.diffusion_model.keep_types()
    return patcher
