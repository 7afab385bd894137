"""What the benchmark commands print: the machine, and tables in Markdown."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path

import torch


def machine(device: torch.device) -> str:
    """One line that says what a number was measured on."""
    if device.type == "cuda":
        chip = torch.cuda.get_device_name(device)
    else:
        count = torch.get_num_threads()
        chip = f"{_processor()}, {count} thread{'s' if count > 1 else ''}"
    return f"{chip}; torch {torch.__version__}"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns line up as plain text too; all but the first are right-aligned."""
    widths = [max(map(len, column)) for column in zip(heads, *rows)]

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join([cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:]))]) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return "\n".join([line(heads), rule, *map(line, rows)])
