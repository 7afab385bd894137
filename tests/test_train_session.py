"""A training's folder: whose it is, what it can be continued from, and the adapter it holds."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_training import RECIPE, data, fresh, model, teacher  # fixtures

from dydit_core.checkpoints.files import FileError
from dydit_core.train.examples import Examples
from dydit_core.train.router import Recipe
from dydit_core.train.session import Job, OtherRun, begin, claim, finish
from dydit_core.train.teacher import Teacher
from dydit_core.train.trajectories import Trajectories


def job(recipe: Recipe = RECIPE) -> Job:
    return Job(recipe, (2, 8, 8), "A title", "tokens", runs=2)


def examples() -> Examples:
    generator = torch.Generator().manual_seed(4)
    given, empty = (tuple(torch.randn(size, generator=generator) for size in sizes) for sizes in (((2, 3, 8), (2, 8)), ((1, 3, 8), (1, 8))))
    return Examples(given, empty)


def test_a_folder_belongs_to_one_base(teacher: Teacher, tmp_path: Path) -> None:
    """Another one may have the very same small tensors, by which an adapter knows its base."""
    claim(tmp_path, job(), teacher, examples())
    claim(tmp_path, job(replace(RECIPE, steps=9, group=4)), teacher, examples())
    other = copy.deepcopy(teacher.model)
    with torch.no_grad():
        other.single_blocks[1].linear2.weight.mul_(1.5)
    with pytest.raises(OtherRun, match="differs in: base"):
        claim(tmp_path, job(), replace(teacher, model=other), examples())


@pytest.mark.parametrize("text", ['{"name": "x"}', "no JSON", "[]"])
def test_a_foreign_folder_is_told(text: str, teacher: Teacher, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(text)
    with pytest.raises(FileError, match="job.json is not of a DyDiT training; choose another folder"):
        claim(tmp_path, job(), teacher, examples())


def test_a_damaged_checkpoint_is_told(teacher: Teacher, data: list[Trajectories], tmp_path: Path) -> None:
    (tmp_path / "training.pt").write_bytes(b"no file of PyTorch")
    with pytest.raises(FileError, match="training.pt is damaged, or of another version of this pack; delete it to begin anew"):
        begin(job(), teacher, data, tmp_path)


def test_the_table_is_made_at_a_budget_that_was_trained(teacher: Teacher, data: list[Trajectories]) -> None:
    """Nearer to the middle there is only 1, whose shift nobody learns."""
    recipe = replace(RECIPE, budgets=(0.2, 1.0), experts=2)
    run = fresh(teacher, data, recipe)
    with torch.no_grad():
        run.shifts.copy_(torch.tensor([0.3, torch.nan]))
    made = finish(run, job(recipe), teacher, data, samples=16)
    assert made.finite and made.facts.training["error_db"] == {} and made.facts.budgets == (0.2,)
