"""Classifier-free guidance on the first three latent channels, as DiT's and SiT's authors draw their pictures.

Their code says that it is for reproducing them and that all channels are usual. The host has one place for such a function.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP
from torch import Tensor

_SLOT, _KEY, _CHANNELS = "sampler_cfg_function", "dydit_guidance", 3
# Of the host's guiders the one that asks there, and then guides all channels once more.
_GUIDES_AGAIN = "Guider_DualCFG"
_asked: ContextVar[bool] = ContextVar("dydit_asked", default=False)


def guide_three(model: Any) -> Any:
    """A clone of MODEL that is guided so, and that refuses to sample where another node took the place, or a guider does not ask there."""
    guided = model.clone()
    guided.set_model_sampler_cfg_function(three_channels)
    guided.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, _KEY, _refuse_others)
    guided.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, _KEY, _refuse_unasked)
    return guided


def three_channels(args: dict) -> Tensor:
    """The host's arguments hold x less the prediction with a class and without; the fourth channel is the former's."""
    _asked.set(True)
    cond, uncond, scale = args["cond"], args["uncond"], args["cond_scale"]
    if scale == 1:
        return cond
    return torch.cat((torch.lerp(uncond[:, :_CHANNELS], cond[:, :_CHANNELS], scale), cond[:, _CHANNELS:]), dim=1)


def _refuse_others(executor: Any, *args: Any, **kwargs: Any) -> Any:
    guider = executor.class_obj
    held = guider.model_options.get(_SLOT)
    if held is not three_channels:
        name = getattr(held, "__qualname__", "").partition(".")[0]
        # The host wraps old-style functions in one of its own, which does not say whose they are.
        other = name if name and name != "ModelPatcher" else "another node"
        raise ValueError(f"DyDiT Checkpoint Loader: {other} also sets how cfg is computed on this model, and only one node can; take that node out, or set "
                         'guidance_channels to "all".')
    if type(guider).__name__ == _GUIDES_AGAIN:
        raise _guides_itself(guider)
    return executor(*args, **kwargs)


def _refuse_unasked(executor: Any, *args: Any, **kwargs: Any) -> Any:
    """Another pack's guider may do as it likes: that it left cfg to the host shows when it has answered."""
    before = _asked.set(False)
    try:
        predicted = executor(*args, **kwargs)
        if not _asked.get():
            raise _guides_itself(executor.class_obj)
        return predicted
    finally:
        _asked.reset(before)


def _guides_itself(guider: Any) -> ValueError:
    return ValueError(f"DyDiT Checkpoint Loader: the guider {type(guider).__name__.removeprefix('Guider_')} computes cfg itself, on all latent channels; take CFGGuider "
                      'or a KSampler, or set guidance_channels to "all".')
