"""docs/composition.md is what these tests found: every row runs, and the page says what they gave."""

from __future__ import annotations

import os

import pytest
from composition import CASES, PAGE, Case, page, ways  # first: starts the host
from tiny import flux, put_back


@pytest.mark.parametrize("way", ways())
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.thing)
def test_it_works_or_is_refused(case: Case, way: str) -> None:
    said = case.check(*ways()[way])
    assert said == (case.words if case.refused else None)
    put_back(flux())


def test_the_page_is_theirs() -> None:
    if os.environ.get("DYDIT_WRITE_DOCS") == "1":
        PAGE.write_text(page())
    assert PAGE.read_text() == page()
