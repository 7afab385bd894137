"""A map of tokens as a picture: each token fills its own square of pixels."""

from __future__ import annotations

import torch
from torch import Tensor

from .colours import cividis

_LUMA = (0.2126, 0.7152, 0.0722)  # ITU-R BT.709


def spread(shown: Tensor, grid: tuple[int, int], extent: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """The map [..., rows, columns] on a picture of `size` (height, width) pixels, without blurring.

    The picture is `extent` tokens high and wide, which `grid` rounds up to whole tokens; a cell of the map may hold
    several of them (`trace.Trace.map`).
    """
    at = [_cells(cells, tokens, across, pixels) for cells, tokens, across, pixels in zip(shown.shape[-2:], grid, extent, size)]
    return shown[..., at[0], :][..., at[1]]


def _cells(cells: int, tokens: int, extent: float, pixels: int) -> Tensor:
    """Which cell each pixel along one axis lies in."""
    token = ((torch.arange(pixels) + 0.5) * extent / pixels).long()
    starts = torch.arange(cells) * tokens // cells
    return torch.searchsorted(starts, token, right=True) - 1


def paint(values: Tensor, pictures: Tensor | None = None, opacity: float = 1.0) -> Tensor:
    """Colours [pictures, H, W, 3] of `values` [frames, H, W] in 0 … 1, laid over `pictures` [pictures, H, W, 3 or more].

    A picture is a video of one frame, and the videos of a batch follow one another. Without pictures: the colours [frames, H, W, 3].

    The scale is fixed: dark blue is 0, yellow is 1. The pictures are grey under it, so that a colour is the map's alone.
    """
    colours = cividis(values)
    if pictures is None:
        return colours
    grey = (pictures[..., :3].float() @ torch.tensor(_LUMA, device=pictures.device))[..., None]
    over = colours.to(grey.device).repeat(len(pictures) // len(colours), 1, 1, 1)
    return torch.lerp(grey.expand(-1, -1, -1, 3), over, opacity)
