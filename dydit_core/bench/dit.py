"""Seconds per model evaluation of DyDiT-XL/2, against the same model dense, at several batch sizes.

Dense (the model's own forward, nothing of ours around it), the published forward, which computes everything and masks it, ours
at the routers' own threshold, where pictures of a batch keep different numbers of tokens, and ours at a budget, where they
keep equally many, take turns, one evaluation each. Medians; "in theory" is the speed-up that the executed FLOPs of those same
evaluations allow. FLOPs are counted before timing and must be those booked, so a token that is padding would show.
Evaluations are from the middle of 50 steps. Weights are random: they set no pace.

The routers decide as a table says, about 0.49 of the block FLOPs, which is what the authors' λ = 0.5 executes; `--like FILE`
takes the table from what the routers of a trained DyDiT decide while it samples.
"""

from __future__ import annotations

from ..models.dit import DiTConfig
from .class_speed import Bench

XL = DiTConfig()
_BENCH = Bench("bench dit", XL, XL.depth // 4, (1, 8, 32), "picture")
add_arguments, run = _BENCH.add_arguments, _BENCH.run
