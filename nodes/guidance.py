"""Classifier-free guidance on the first three latent channels, as DiT's and SiT's authors draw their pictures.

Their code says that it is for reproducing them and that all channels are usual. The host has one place for such a function.
"""

from __future__ import annotations

from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

_SLOT, _KEY, _CHANNELS = "sampler_cfg_function", "dydit_guidance", 3


def guide_three(model: Any) -> Any:
    """A clone of MODEL that is guided so, and that refuses to sample where another node took the place."""
    guided = model.clone()
    guided.set_model_sampler_cfg_function(three_channels)
    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _refuse_another)
    return guided


def three_channels(args: dict) -> Tensor:
    """The host's arguments hold x less the prediction with a class and without; the fourth channel is the former's."""
    cond, uncond, scale = args["cond"], args["uncond"], args["cond_scale"]
    if scale == 1:
        return cond
    return torch.cat((torch.lerp(uncond[:, :_CHANNELS], cond[:, :_CHANNELS], scale), cond[:, _CHANNELS:]), dim=1)


def _refuse_another(executor: Any, *args: Any, **kwargs: Any) -> Any:
    held = executor.class_obj.model_options.get(_SLOT)
    if held is not three_channels:
        name = getattr(held, "__qualname__", "").partition(".")[0]
        # The host wraps old-style functions in one of its own, which does not say whose they are.
        other = name if name and name != "ModelPatcher" else "another node"
        raise ValueError(f"DyDiT Checkpoint Loader: {other} also sets how cfg is computed on this model, and only one node can; take that node out, or set "
                         'guidance_channels to "all".')
    return executor(*args, **kwargs)
