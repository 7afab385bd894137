"""A contact sheet: pictures side by side, each with lines of text under it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

_INK, _PAPER = "#1d2733", "#ffffff"
_CELL = 320  # pixels of the longer side of a picture, at most


def contact_sheet(pictures: Sequence[Image.Image], captions: Sequence[Sequence[str]]) -> Image.Image:
    """`pictures` in rows, about as many rows as columns; `captions`: lines for each. Larger pictures are scaled down."""
    scale = min(1.0, *(_CELL / max(picture.size) for picture in pictures))
    cells = [picture.resize(tuple(max(1, round(scale * side)) for side in picture.size), Image.Resampling.LANCZOS) for picture in pictures]
    font, gap = ImageFont.load_default(15), 12
    line = 20
    width = max(cell.width for cell in cells)
    width = max(width, *(math.ceil(font.getlength(text)) for lines in captions for text in lines))
    height = max(cell.height for cell in cells) + line * max(len(lines) for lines in captions) + 8
    columns = math.ceil(math.sqrt(len(cells)))
    rows = math.ceil(len(cells) / columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), gap + rows * (height + gap)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for index, (cell, lines) in enumerate(zip(cells, captions)):
        x, y = gap + index % columns * (width + gap), gap + index // columns * (height + gap)
        sheet.paste(cell, (x, y))
        for number, text in enumerate(lines):
            draw.text((x, y + cell.height + 6 + number * line), text, _INK, font)
    return sheet
