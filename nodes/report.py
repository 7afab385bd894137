"""The sentences on the node: what can be reached before a run, what was spent after it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_TOLERANCE = 0.02
IGNORED = "The file's own threshold decides what is computed; the slider is ignored."


@dataclass(frozen=True)
class Outlook:
    """What a run can reach. `expected` and `floor` are budgets, `held_bytes` what the run holds beside the model.

    Both are None where the budget does not decide. `trained_text`: text tokens that the router was trained with, and
    `text_tokens` the prompt's, both None for a router that takes any number.
    """

    router: str
    substitute: str
    expected: float | None
    floor: float | None
    held_bytes: int
    whole_layers: tuple[str, ...] = ()
    text_tokens: int | None = None
    trained_text: int | None = None


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}".rstrip("0").rstrip(".") + " %"


def size(count: int) -> str:
    """Bytes in the unit a reader of task managers expects."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def whole_layers(how: str, names: list[str], reason: str) -> str:
    """`names`: a layer's name for each block in which it cannot be cut; `how` it runs there instead."""
    counts = ", ".join(f"{name} of {count} block{'s' if count > 1 else ''}" for name, count in sorted(Counter(names).items()))
    return f"{counts}: computed {how} because {reason}; that raises the floor."


def before(asked: float, outlook: Outlook) -> list[str]:
    """Lines shown when the size of the picture is known."""
    if outlook.expected is None:
        lines = [f"{outlook.router} × {outlook.substitute}. {IGNORED}"]
    else:
        lines = [f"{outlook.router} × {outlook.substitute}: {percent(outlook.expected)} of the block FLOPs expected "
                 f"(asked {percent(asked)}, floor {percent(outlook.floor)})."]
    if outlook.expected is not None and outlook.expected > asked + _TOLERANCE:
        lines.append(f"{percent(asked)} is below what this graph can reach; it runs at {percent(outlook.expected)}. "
                     "More steps or a lower min_keep reach further.")
    if outlook.held_bytes:
        lines.append(f"The run holds {size(outlook.held_bytes)} beside the model.")
    if outlook.text_tokens != outlook.trained_text:
        lines.append(f"The prompt has {outlook.text_tokens} text tokens and this router was trained with {outlook.trained_text}, "
                     "padding included; which tokens it chooses shifts a little.")
    return [*lines, *outlook.whole_layers]


def after(asked: float, achieved: float | None, evaluations: int, seconds: float, outlook: Outlook | None,
          state: str) -> list[str]:
    """Lines shown when sampling has ended: it is "done", was "interrupted", or has "failed"."""
    if achieved is None:
        return [f"Stopped {'by an error ' if state == 'failed' else ''}before the first step."]
    how = f" with {outlook.router} × {outlook.substitute}" if outlook else ""
    end = "Stopped by an error. " if state == "failed" else ""
    so_far = "" if state == "done" else " so far"
    ignored = outlook is not None and outlook.expected is None
    lines = [f"{end}{'Spent' if ignored else f'Asked {percent(asked)} → spent'} {percent(achieved)} of the block FLOPs{so_far}{how}, "
             f"{evaluations} evaluation{'s' if evaluations != 1 else ''}, {seconds:.2f} s each."]
    if state == "done" and achieved > asked + _TOLERANCE and outlook and not ignored:
        lines.append(f"{percent(outlook.floor)} is the least this graph can spend here: text, a dense first step with reuse, and "
                     "steps outside start and end are computed in any case.")
    elif outlook and outlook.floor is not None:
        lines.append(f"The floor here is {percent(outlook.floor)}.")
    if outlook and outlook.held_bytes:
        lines.append(f"The run held {size(outlook.held_bytes)} beside the model.")
    return lines


def unrecorded(taken: int, kept: int, late: int) -> list[str]:
    """Lines on evaluations that are in no map: `late` of those `taken` were left out, and of the others not `kept`."""
    lines = []
    if late:
        lines.append(f"{late} of {taken} evaluations are not in the map: recording them would have held up sampling.")
    if taken - late > kept:
        lines.append(f"The map holds {kept} of {taken} evaluations: a picture this large would fill the room for all runs.")
    return lines
