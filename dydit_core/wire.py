"""A trace in JSON, as the map on the node reads it.

Fractions travel as base64 of one unsigned byte per value, row-major, 255 for 100 %.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence

import numpy as np

from .trace import MAP_SIDE, Bits, Evaluation, Trace, mean_of

VERSION = 2


def as_bytes(fractions: np.ndarray) -> str:
    return base64.b64encode(np.rint(fractions * 255).astype(np.uint8).tobytes()).decode()


def live(evaluation: Evaluation, blocks: Sequence[str]) -> dict:
    """One evaluation in short: its mean map and what each block kept; of a video also the maps of the frames, where all of
    them together hold no more than one map may."""
    maps = evaluation.map()
    return {
        "step": evaluation.index, "sigma": evaluation.sigma, "flops": evaluation.flops, "computed": evaluation.computed,
        **_shown(evaluation, maps.mean(0)), "frames": evaluation.frames,
        "each": as_bytes(maps) if len(maps) > 1 and maps.size <= MAP_SIDE**2 else None,
        "branches": list(evaluation.branches), "blocks": list(blocks),
        "kept": {branch: as_bytes(kept) for branch, kept in zip(evaluation.branches, evaluation.kept)},
        "heads": _fractions([evaluation.heads]), "groups": _fractions([evaluation.groups]),
    }


def summary(trace: Trace) -> dict:
    """All numbers of a run and none of its maps. A branch that a step did not run kept nothing there."""
    first, steps = next(iter(trace.whole), None), trace.evaluations
    token_rows, token_cols = first.grid if first else (0, 0)
    rows, cols = first.maps.shape[-2:] if first else (0, 0)
    return {
        **trace.facts, "token_rows": token_rows, "token_cols": token_cols, "rows": rows, "cols": cols,
        "frames": first.frames if first else 0, "branches": list(trace.branches), "blocks": list(trace.blocks),
        "steps": [{"step": step.index, "sigma": step.sigma, "flops": step.flops, "computed": step.computed, "seconds": step.seconds,
                   "branches": list(step.branches)} for step in steps],
        "kept": {branch: as_bytes(np.stack([_kept(step, branch) for step in steps])) for branch in trace.branches},
        "heads": _fractions([step.heads for step in steps]), "groups": _fractions([step.groups for step in steps]),
    }


def one_map(trace: Trace, step: int | None, block: int | None, branch: str | None = None, frame: int | None = None) -> dict:
    """One map; None is the mean over all of them. LookupError says what there is."""
    shown = trace.map(step, block, branch, frame)
    evaluation = trace.whole[0] if step is None else trace.at(step)
    single = step is not None and block is not None
    return {
        "v": VERSION, "run": trace.run, "step": _or_mean(step), "block": _or_mean(block), "branch": branch, "frame": frame,
        **_shown(evaluation, shown), "computed": mean_of(shown, evaluation.grid),
        "heads": _digits(evaluation.heads, block) if single else None,
        "groups": _digits(evaluation.groups, block) if single else None,
    }


def _shown(evaluation: Evaluation, shown: np.ndarray) -> dict:
    """A cell of `shown` [rows, columns] is one token, or the mean of several where the picture has more than that."""
    token_rows, token_cols = evaluation.grid
    return {"rows": shown.shape[0], "cols": shown.shape[1], "grid": as_bytes(shown), "token_rows": token_rows, "token_cols": token_cols}


def _kept(step: Evaluation, branch: str) -> np.ndarray:
    return step.kept[step.branches.index(branch)] if branch in step.branches else np.zeros(step.shape[0])


def _fractions(steps: Sequence[Bits | None]) -> str | None:
    """Of units computed [steps, blocks]."""
    return as_bytes(np.stack([bits.values().mean(1) for bits in steps])) if steps and None not in steps else None


def _digits(bits: Bits | None, block: int) -> str | None:
    return "".join("1" if on else "0" for on in bits.values(block)) if bits is not None else None


def _or_mean(index: int | None) -> int | str:
    return "mean" if index is None else index
