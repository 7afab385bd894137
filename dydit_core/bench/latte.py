"""Seconds per model evaluation of Latte-XL/2 with DyDiT's routers, against the same model dense, on videos of 16 frames.

As `bench dit`: dense, the published way of masks, ours at the routers' own threshold and ours at a budget take turns; the
routers, in spatial and in temporal blocks, decide as the table of `bench dit` says, or as those of the file in `--like` do.
On a CPU two pairs of the blocks run at full width: a video has 4,096 tokens, as many as 16 pictures.
"""

from __future__ import annotations

from ..models.latte import LatteConfig
from .class_speed import Bench

XL = LatteConfig(classes=101)
_BENCH = Bench("bench latte", XL, 4, (1,), "video")
add_arguments, run = _BENCH.add_arguments, _BENCH.run
