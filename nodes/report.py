"""The sentences on the node: what can be reached before a run, what was spent after it."""

from __future__ import annotations

from dataclasses import dataclass

_TOLERANCE = 0.02


@dataclass(frozen=True)
class Outlook:
    """What a run can reach. `expected` and `floor` are budgets, `history_bytes` what reuse holds during the run."""

    router: str
    substitute: str
    expected: float
    floor: float
    history_bytes: int
    whole_layers: str | None


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}".rstrip("0").rstrip(".") + " %"


def size(count: int) -> str:
    """Bytes in the unit a reader of task managers expects."""
    return f"{count / 2**30:.1f} GB" if count >= 2**30 else f"{count / 2**20:.0f} MB"


def before(asked: float, outlook: Outlook) -> list[str]:
    """Lines shown when the size of the picture is known."""
    lines = [f"{outlook.router} × {outlook.substitute}: {percent(outlook.expected)} of the block FLOPs expected "
             f"(asked {percent(asked)}, floor {percent(outlook.floor)})."]
    if outlook.expected > asked + _TOLERANCE:
        lines.append(f"{percent(asked)} is below what this graph can reach; it runs at {percent(outlook.expected)}. "
                     "More steps or a lower min_keep reach further.")
    if outlook.history_bytes:
        lines.append(f"Reuse holds {size(outlook.history_bytes)} for the run.")
    if outlook.whole_layers:
        lines.append(f"The fused layers run on every token because {outlook.whole_layers}; that raises the floor.")
    return lines


def after(asked: float, achieved: float | None, evaluations: int, seconds: float, outlook: Outlook | None,
          state: str) -> list[str]:
    """Lines shown when sampling has ended: it is "done", was "interrupted", or has "failed"."""
    if achieved is None:
        return [f"Stopped {'by an error ' if state == 'failed' else ''}before the first step."]
    how = f" with {outlook.router} × {outlook.substitute}" if outlook else ""
    end = {"interrupted": "Interrupted. ", "failed": "Stopped by an error. "}.get(state, "")
    lines = [f"{end}Asked {percent(asked)} → spent {percent(achieved)} of the block FLOPs{how}, "
             f"{evaluations} evaluation{'s' if evaluations != 1 else ''}, {seconds:.2f} s each."]
    if state == "done" and achieved > asked + _TOLERANCE and outlook:
        lines.append(f"{percent(outlook.floor)} is the least this graph can spend here: text, a dense first step with reuse, and "
                     "steps outside start and end are computed in any case.")
    return lines
