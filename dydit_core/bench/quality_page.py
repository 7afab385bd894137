"""The quality tables as Markdown, with a plot for each contest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from statistics import fmean

from PIL import Image

from ..plot import Point, Series, around, lines
from .judge import REAL_SCENES, Measured
from .lab import CLASSES, PROMPTS, TWIN, VIDEOS, Settings
from .lineup import CHECK, FEWER, NEAR, Job
from .report import table

ALLOWANCE = 0.02  # what a row may spend above what was asked and still be the best one
_TITLES = {CHECK: "What scene-FID tells apart", TWIN: "4 steps, few-step twin", NEAR: "How near 4 steps are to 20"}


@dataclass(frozen=True)
class Row:
    job: Job
    measured: Measured

    @property
    def keeps_to_budget(self) -> bool:
        return self.measured.spent <= self.job.asked + ALLOWANCE

    @property
    def likeness(self) -> float:
        return self.measured.psnr if self.measured.psnr is not None else float("inf")


Cell = Callable[[Row], str]


@dataclass(frozen=True)
class _Kind:
    """What the page says of one kind of drawings: what was `asked` for, what a `thing` is called, what the `columns` mean."""

    asked: str
    thing: str
    means: str
    columns: Mapping[str, Cell]


_FIRST: dict[str, Cell] = {
    "asked": lambda row: f"{row.job.asked:g}",
    "spent": lambda row: f"{row.measured.spent:.3f}{' (floor)' if row.job.floored else ''}",
    "GFLOPs": lambda row: f"{row.measured.gigaflops:.1f}",
    "PSNR": lambda row: _decibels(row.measured.psnr),
}
_LAST: dict[str, Cell] = {"seconds": lambda row: "" if row.measured.seconds is None else f"{row.measured.seconds:.2f}"}
_PICTURES = _Kind(
    "pictures of classes in turn", "picture",
    "PSNR is in dB and, like SSIM, to the dense picture of the same number of steps, whole and on detailed tokens; accuracy is of what was "
    f"asked for, by the classifier; scene-FID is the Fréchet distance of its activations to those of {REAL_SCENES:,} freshly drawn scenes, in "
    "percent of their variance; with so few pictures it is too high, for every row alike.",
    {**_FIRST, "PSNR, detail": lambda row: _decibels(row.measured.psnr_detail), "SSIM": lambda row: f"{row.measured.ssim:.4f}",
     "accuracy": lambda row: f"{row.measured.accuracy:.1%}", "scene-FID": lambda row: f"{row.measured.fid:.2f}", **_LAST})
_VIDEOS = _Kind(
    "videos of classes in turn", "video",
    "PSNR is in dB and, like SSIM, which is the mean over frames, to the dense video of the same number of steps; the median is over "
    "the PSNR of single videos, as one that turns into another decides the first number; PSNR of the frame differences is that of what "
    "changes from each frame to the next; direction is the share of videos whose things go the way that their class says.",
    {**_FIRST, "PSNR, median video": lambda row: _decibels(row.measured.psnr_median),
     "PSNR, frame differences": lambda row: _decibels(row.measured.psnr_differences), "SSIM": lambda row: f"{row.measured.ssim:.4f}",
     "direction": lambda row: f"{row.measured.accuracy:.1%}", **_LAST})
_KINDS = {PROMPTS: replace(_PICTURES, asked="held-out prompts"), CLASSES: _PICTURES, VIDEOS: _VIDEOS}


def markdown(rows: Sequence[Row], settings: Settings, machine: str) -> str:
    """All tables; the plots they show are files beside (see `plots`)."""
    products, kind = "bfloat16" if settings.bfloat16 else "float32", _KINDS[settings.of]
    parts = [
        f"{settings.prompts} {kind.asked}, Euler, cfg {settings.cfg:g}, {products} products, on {machine}. {kind.means} GFLOPs (of the blocks) "
        f"and seconds are for one {kind.thing}; seconds were taken in batches of {settings.batch}, where nothing of ours ran beside. "
        "*Floor*: less cannot be spent. Bold: nearest to dense of those that kept to the budget.\n"]
    for name, group in groupby(rows, key=lambda row: row.job.table):
        some = list(group)
        parts.append(f"\n## {title(name)}\n")
        if name in (CHECK, NEAR):
            parts.append(_plain(some))
            continue
        if chart(some):
            parts.append(f"![PSNR over what was spent]({plot_name(name)})\n")
        parts += [_contest(some, kind.columns), "", *_verdicts(some)]
    return "\n".join(parts) + "\n"


def title(name: str) -> str:
    return _TITLES.get(name, f"{name} steps")


def plot_name(name: str) -> str:
    return f"quality_{name.replace(' ', '_')}.png"


def plots(rows: Sequence[Row]) -> dict[str, Image.Image]:
    """By file name, of the contests that have budgets."""
    contests = {name: chart(list(group)) for name, group in groupby(rows, key=lambda row: row.job.table) if name not in (CHECK, NEAR)}
    return {plot_name(name): picture for name, picture in contests.items() if picture}


def chart(rows: Sequence[Row]) -> Image.Image | None:
    """PSNR over what was spent, a line for each family: of the method in it that is best over all budgets."""
    families: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        if row.job.family and row.measured.psnr is not None:
            name = FEWER if row.job.family == FEWER else row.job.name
            families.setdefault(row.job.family, {}).setdefault(name, []).append(row)
    best = [max(methods.items(), key=lambda method: fmean(row.likeness for row in method[1])) for methods in families.values()]
    # The font of the plots has no "×".
    series = [Series(name.replace(" × ", ", "), [Point(row.measured.spent, row.likeness, "") for row in some]) for name, some in best]
    points = [point for one in series for point in one.points]
    return lines(title(rows[0].job.table), around("FLOPs spent, of dense", [point.x for point in points]),
                 around("PSNR to dense, dB", [point.y for point in points]), series) if points else None


def _contest(rows: Sequence[Row], columns: Mapping[str, Cell]) -> str:
    """A column in which no row has anything is left out."""
    cells = [[_marked(row, rows), *(cell(row) for cell in columns.values())] for row in rows]
    shown = [place for place in range(len(columns) + 1) if any(line[place] for line in cells)]
    heads = ("method", *columns)
    return table([heads[place] for place in shown], [[line[place] for place in shown] for line in cells])


def _marked(row: Row, rows: Sequence[Row]) -> str:
    mark = "**" if row is _best(other for other in rows if other.job.family and other.job.asked == row.job.asked) else ""
    return f"{mark}{row.job.name}{mark}"


def _plain(rows: Sequence[Row]) -> str:
    """The columns that a table without budgets has."""
    check = rows[0].job.table == CHECK
    return table(("pictures", "scene-FID", "accuracy", *(() if check else ("PSNR", "SSIM"))), [
        (row.job.name, f"{row.measured.fid:.2f}", f"{row.measured.accuracy:.1%}",
         *(() if check else (_decibels(row.measured.psnr), f"{row.measured.ssim:.4f}"))) for row in rows])


def _verdicts(rows: Sequence[Row]) -> list[str]:
    """For each budget the best trained row, the best untrained one, and fewer steps."""
    verdicts = []
    for asked in dict.fromkeys(row.job.asked for row in rows if row.job.family):
        rivals = [row for row in rows if row.job.family and row.job.asked == asked]
        ours = [row for row in rivals if row.job.family != FEWER]
        best = {who: _best(row for row in ours if row.job.trained == (who == "trained")) for who in ("trained", "untrained")}
        named = [f"best {who} {_named(row)}" for who, row in best.items() if row]
        named += [_named(row) for row in rivals if row.job.family == FEWER]
        verdicts.append(f"- At {asked:g}: {', '.join(named)}.{_lead(**best)}")
    return verdicts


def _lead(trained: Row | None, untrained: Row | None) -> str:
    if trained is None or untrained is None:
        return ""
    ahead = trained.likeness - untrained.likeness
    first, second = ("Trained", "untrained") if ahead >= 0 else ("Untrained", "trained")
    return f" {first} beats {second} by {abs(ahead):.1f} dB."


def _named(row: Row) -> str:
    return f"{row.job.name} {_decibels(row.measured.psnr)} dB"


def _best(rows: Iterable[Row]) -> Row | None:
    """Nearest to dense among those that kept to the budget: a row at a floor above it has bought its likeness."""
    return max((row for row in rows if row.keeps_to_budget), key=lambda row: row.likeness, default=None)


def _decibels(value: float | None) -> str:
    return "same" if value is None else f"{value:.1f}"
