"""Which rows the quality tables have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from ..demo.twin import STEPS as TWIN_STEPS
from ..demo.twin import TEACHER_STEPS
from .contenders import OPEN, RANDOM
from .lab import BASE, OTHER_SEED, SCENES, TWIN, Lab, Shot

DENSE, FEWER = "dense", "fewer steps"
CHECK, NEAR = "check", "near"  # the two tables that are no contests
# What scene-FID must tell from dense pictures: too few steps, and random tokens at these budgets.
_FEW, _RANDOM_BUDGETS = 6, (0.75, 0.5)


@dataclass(frozen=True)
class Job:
    """One row of `table`: `shot` is held to `reference`. `asked`: its budget.

    `family`: rows that share a line of the plot; `floored`: no less than its floor can be spent, which is above `asked`.
    """

    table: str
    asked: float
    name: str
    shot: Shot
    reference: Shot
    family: str = ""
    trained: bool = False
    floored: bool = False


def lineup(lab: Lab, steps: Sequence[int], budgets: Sequence[float], only: Sequence[str] = ("",)) -> list[Job]:
    """All rows, in order; of those that are not dense the ones with one of `only` in their name."""
    jobs = list(_check(max(steps)))
    for count in steps:
        jobs += _contest(lab, str(count), Shot(BASE, count), budgets)
    if TWIN in lab.models:
        jobs += [*_contest(lab, TWIN, Shot(TWIN, TWIN_STEPS), budgets), *_near()]
    return [job for job in jobs if job.name == DENSE or any(word in job.name for word in only)]


def class_lineup(lab: Lab, steps: Sequence[int], budgets: Sequence[float], only: Sequence[str] = ("",)) -> list[Job]:
    """The same for models that are asked for classes: one table for each and number of steps."""
    jobs = [job for model in lab.models for count in steps for job in _contest(lab, f"{model} {count}", Shot(model, count), budgets)]
    return [job for job in jobs if job.name == DENSE or any(word in job.name for word in only)]


def _contest(lab: Lab, table: str, dense: Shot, budgets: Sequence[float]) -> Iterator[Job]:
    """Every contender at every budget, held to the dense pictures of as many steps."""
    yield Job(table, 1.0, DENSE, dense, dense)
    yield Job(table, 1.0, f"{DENSE}, another seed", replace(dense, seed=OTHER_SEED), dense)
    for name, contender in lab.contenders[dense.model].items():
        if contender.family == OPEN:
            yield Job(table, 1.0, name, replace(dense, method=name), dense)
    floors = {name: lab.floor(dense.model, name, dense.steps) for name, contender in lab.contenders[dense.model].items()
              if contender.family != OPEN}
    for budget in budgets:
        for name, floor in floors.items():
            contender = lab.contenders[dense.model][name]
            # Below its floor a method spends the same whatever is asked: one measurement for all of those rows.
            shot = replace(dense, method=name, budget=budget if budget >= floor else 0.0)
            yield Job(table, budget, name, shot, dense, contender.family, contender.trained, budget < floor)
        fewer = max(1, int(budget * dense.steps + 1e-9))
        yield Job(table, budget, f"{FEWER} ({fewer})", replace(dense, steps=fewer), dense, FEWER)


def _check(steps: int) -> Iterator[Job]:
    """Does scene-FID tell good pictures from bad ones?"""
    dense = Shot(BASE, steps)
    yield Job(CHECK, 1.0, "the scenes themselves", Shot(SCENES, 0), dense)
    yield Job(CHECK, 1.0, f"{DENSE}, {steps} steps", dense, dense)
    yield Job(CHECK, 1.0, f"{DENSE}, {steps} steps, another seed", replace(dense, seed=OTHER_SEED), dense)
    yield Job(CHECK, 1.0, f"{DENSE}, {_FEW} steps", replace(dense, steps=_FEW), dense)
    for budget in _RANDOM_BUDGETS:
        yield Job(CHECK, budget, f"{RANDOM}, {steps} steps, budget {budget:g}", replace(dense, method=RANDOM, budget=budget), dense)


def _near() -> Iterator[Job]:
    """How near few steps are to many."""
    many = Shot(BASE, TEACHER_STEPS)
    yield Job(NEAR, 1.0, f"base, {TEACHER_STEPS} steps", many, many)
    yield Job(NEAR, 1.0, f"base, {TWIN_STEPS} steps", Shot(BASE, TWIN_STEPS), many)
    yield Job(NEAR, 1.0, f"twin, {TWIN_STEPS} steps", Shot(TWIN, TWIN_STEPS), many)
