"""The sentences on the node: what can be reached before a run, what was spent after it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

_TOLERANCE = 0.02
_FEW_STEPS = 6
# Multiply-adds of one linear layer below which a GPU spends its time on starting work, not on doing it (some 10 µs).
_FILLS_A_GPU = 1e9
IGNORED = "The file's own threshold decides what is computed; the slider is ignored."


@dataclass(frozen=True)
class Outlook:
    """What a run can reach. `expected` and `floor` are budgets, `held_bytes` what the run holds beside the model.

    Both are None where the budget does not decide. `trained_text`: text tokens that the router was trained with, and
    `text_tokens` the prompt's, both None for a router that takes any number. `steps` of the schedule; `idle_gpu`: the
    model runs on one that it cannot fill; `earlier`: budget and seconds an evaluation of the last such run on this node. `protected`: fraction of the
    tokens that a mask protects. `has_text`: the model runs on text tokens too. `min_keep`: fraction of them that is always computed;
    `window`: some steps lie outside start and end.
    """

    router: str
    substitute: str
    expected: float | None
    floor: float | None
    held_bytes: int
    whole_layers: tuple[str, ...] = ()
    text_tokens: int | None = None
    trained_text: int | None = None
    steps: int = 0
    idle_gpu: bool = False
    earlier: tuple[float, float] | None = None
    protected: float = 0.0
    has_text: bool = True
    min_keep: float = 0.0
    window: bool = False

    @property
    def ignored(self) -> bool:
        """Whether a file's threshold decides, and not the budget."""
        return self.expected is None


def idles(tokens: int, width: int) -> bool:
    """Whether `tokens` (of all batch rows) are too few for a GPU at this width: an estimate."""
    return tokens * width**2 < _FILLS_A_GPU


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
    if outlook.ignored:
        lines = [f"{outlook.router} × {outlook.substitute}. {IGNORED}"]
    else:
        lines = [f"{outlook.router} × {outlook.substitute}: {percent(outlook.expected)} of the block FLOPs expected "
                 f"(asked {percent(asked)}, floor {percent(outlook.floor)})."]
    if not outlook.ignored and outlook.expected > asked + _TOLERANCE:
        lines.append(f"{percent(asked)} is below what this graph can reach; it runs at {percent(outlook.expected)}. {_further(outlook)}")
    if outlook.protected:
        lines.append(f"{percent(outlook.protected)} of the tokens are protected and always computed; that raises the floor.")
    if outlook.held_bytes:
        lines.append(f"The run holds {size(outlook.held_bytes)} beside the model.")
    if outlook.earlier:
        lines.append(f"The last run here took {outlook.earlier[1]:.2f} s an evaluation, at {percent(outlook.earlier[0])}.")
    if outlook.steps <= _FEW_STEPS and outlook.substitute == "reuse":
        lines.append(f"{outlook.steps} step{'s' if outlook.steps != 1 else ''}: the first is computed in full, so there is little to reuse; "
                     "expect the picture to change more than with 8 or more.")
    if outlook.idle_gpu:
        lines.append("This model and size cannot fill this GPU: expect fewer FLOPs, not fewer seconds.")
    if outlook.text_tokens != outlook.trained_text:
        lines.append(f"The prompt has {outlook.text_tokens} text tokens and this router was trained with {outlook.trained_text}, "
                     "padding included; which tokens it chooses shifts a little.")
    return [*lines, *outlook.whole_layers]


@dataclass(frozen=True)
class Outcome:
    """How a run ended: `state` is "done", "interrupted" or "failed", the last with an `error`. `achieved` is a budget, None before the
    first evaluation; `seconds` are those of one evaluation."""

    state: str
    error: str
    achieved: float | None
    evaluations: int
    seconds: float


def after(asked: float, outcome: Outcome, outlook: Outlook | None) -> list[str]:
    """Lines shown when sampling has ended."""
    achieved, failed, done = outcome.achieved, outcome.state == "failed", outcome.state == "done"
    why = [outcome.error] if outcome.error else []
    if achieved is None:
        return [f"Stopped {'by an error ' if failed else ''}before the first step.", *why]
    how = f" with {outlook.router} × {outlook.substitute}" if outlook else ""
    end = "Stopped by an error. " if failed else ""
    so_far = "" if done else " so far"
    ignored = outlook is not None and outlook.ignored
    lines = [f"{end}{'Spent' if ignored else f'Asked {percent(asked)} → spent'} {percent(achieved)} of the block FLOPs{so_far}{how}, "
             f"{outcome.evaluations} evaluation{'s' if outcome.evaluations != 1 else ''}, {outcome.seconds:.2f} s each.", *why,
             *([IGNORED] if ignored else [])]
    if done and achieved > asked + _TOLERANCE and outlook and not ignored:
        *most, last = _always(outlook)
        lines.append(f"{percent(achieved)} is the least this graph can spend here: {', '.join(most)} and {last} are computed in any case. {_further(outlook)}")
    elif outlook and outlook.floor is not None:
        lines.append(f"The floor here is {percent(outlook.floor)}.")
    if outlook and outlook.held_bytes:
        lines.append(f"The run held {size(outlook.held_bytes)} beside the model.")
    return lines


def _always(outlook: Outlook) -> list[str]:
    """What no budget leaves out."""
    parts = {
        f"the protected {percent(outlook.protected)} of the tokens": outlook.protected,
        "attention": True,
        "text": outlook.has_text,
        "a dense first step with reuse": outlook.substitute == "reuse",
        "steps outside start and end": outlook.window,
        f"{percent(outlook.min_keep)} of the tokens (min_keep)": True,
    }
    return [part for part, applies in parts.items() if applies]


def _further(outlook: Outlook) -> str:
    remedy = "A smaller protect mask" if outlook.protected else "More steps or a lower min_keep" if outlook.substitute == "reuse" else "A lower min_keep"
    return f"{remedy} would reach further."


def unrecorded(taken: int, kept: int, late: int) -> list[str]:
    """Lines on evaluations that are in no map: `late` of those `taken` were left out, and of the others not `kept`."""
    lines = []
    if late:
        lines.append(f"{late} of {taken} evaluations are not in the map: recording them would have held up sampling.")
    if taken - late > kept:
        lines.append(f"The map holds {kept} of {taken} evaluations: a picture this large would fill the room for all runs.")
    return lines
