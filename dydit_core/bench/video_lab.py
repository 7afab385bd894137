"""The quality tables' videos: the small Latte under its adapter and under what needs none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoints.adapter import load_adapter
from ..checkpoints.files import bad
from ..checkpoints.fit import layout_of
from ..demo.class_model import load_class_model
from ..demo.files import CLASS_VAE_FILE, LATTE_ADAPTER_FILE, LATTE_FILE
from ..demo.latte import decode_videos
from ..demo.vae import load_decoder
from ..models.latte import LatteConfig
from .contenders import contenders
from .lab import Lab

LATTE = "Latte"
_ADAPTER = "SDT, made for reuse"


class VideoLab(Lab):
    """`models` is the one called LATTE. Classes take turns. Raises FileError."""

    def _open(self, weights: Path) -> None:
        path, adapter, remedy = weights / LATTE_FILE, weights / LATTE_ADAPTER_FILE, "make it: python -m dydit_core.demo.make_latte"
        if not path.exists():
            raise bad(weights, "holds no small Latte", remedy)
        self.drawn = load_class_model(path)
        config = self.drawn.model.config
        if not isinstance(config, LatteConfig):
            raise bad(path, f"is a {config.title} and no Latte", remedy)
        files = ({_ADAPTER: adapter} if adapter.exists() else {}) | dict(self.settings.adapters)
        for file in files.values():
            if (reason := load_adapter(file).fit.refusal(layout_of(self.drawn.model, config.hidden_size))) is not None:
                raise bad(file, f"is for another model ({reason})", "give an adapter of the small Latte")
        self.decoder = load_decoder(weights / CLASS_VAE_FILE)
        self.models, self.contenders = {LATTE: self.drawn.model}, {LATTE: contenders(files)}
        self.size = config.latent_size
        self.conditioning = (torch.arange(self.settings.prompts) % config.classes,)
        self.uncond = (torch.tensor([config.classes]),)

    def files(self, model: str) -> list[Path]:
        return [CLASS_VAE_FILE, LATTE_FILE]

    def schedule(self, model: str) -> Callable[[int], list[float]]:
        return self.drawn.schedule

    def decoded(self, latents: Tensor) -> Tensor:
        """Frames [videos, frames, 3, H, W]."""
        return decode_videos(latents, self.decoder)
