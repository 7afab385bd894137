"""Every language says as much as English does: the words on the nodes, the widget's, the help pages. Needs no ComfyUI.

That English is what the nodes say: tests/host/test_host_locales.py. The widget's tables: tests/web/strings.test.mjs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dydit_core.methods import AUTO, METHODS, SUBSTITUTES

ROOT = Path(__file__).parents[1]
LOCALES = ROOT / "locales"
HELP = ROOT / "web/docs"
LANGUAGES = sorted(folder.name for folder in LOCALES.iterdir() if folder.name != "en")
TRANSLATED_PAGES = sorted(HELP.glob("*/*.md"))
VUE_I18N_SYNTAX = set("{}@|")


def load(language: str) -> dict[str, str]:
    """Every string by its path in the file."""
    return dict(flat(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8"))))


def flat(tree: dict[str, Any], path: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flat(value, f"{path}{key}.")
        else:
            yield path + key, value


def numbers(text: str) -> set[str]:
    """Those an artist may type or read, of more than one digit or after a point: the small ones are words in some languages."""
    return set(re.findall(r"\d+\.\d+|\d{2,}", text))


def listed(page: Path) -> list[str]:
    """Inputs and outputs, in the order of the page."""
    return re.findall(r"^- `(\w+)`", page.read_text(encoding="utf-8"), re.MULTILINE)


def test_chinese_and_japanese_ship() -> None:
    assert {"zh", "ja"} <= set(LANGUAGES)


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_language_has_every_word_of_the_nodes(language: str) -> None:
    english, other = load("en"), load(language)
    assert list(other) == list(english)
    assert all(isinstance(text, str) and text.strip() for text in other.values())


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_frontend_reads_no_word_as_syntax(language: str) -> None:
    assert not {key: text for key, text in load(language).items() if VUE_I18N_SYNTAX & set(text)}


@pytest.mark.parametrize("language", LANGUAGES)
def test_numbers_files_and_options_are_those_of_the_english(language: str) -> None:
    """A translation that was left behind gives itself away by these."""
    english, other = load("en"), load(language)
    for key, text in english.items():
        fixed = set(re.findall(r"[\w.]*_[\w.]+|models/\w+|FLUX\.1 \w+", text)) if key.endswith(("tooltip", "description")) else set()
        missing = {word for word in fixed if word.rstrip(".") not in other[key]}
        assert not missing and numbers(other[key]) >= numbers(text), (key, missing, numbers(text) - numbers(other[key]))
    choices = {"method": [AUTO, *METHODS], "substitute": SUBSTITUTES}  # stored in workflows, so they stay as they are
    assert not [option for name, options in choices.items() for option in options if option not in other[f"DyDiTBudget.inputs.{name}.tooltip"]]


def test_the_widget_speaks_the_languages_of_the_nodes() -> None:
    assert {path.name.split(".")[1] for path in (ROOT / "web").glob("strings.*.js")} == set(LANGUAGES)


@pytest.mark.parametrize("page", TRANSLATED_PAGES, ids=lambda page: f"{page.parent.name}/{page.stem}")
def test_a_translated_help_page_is_as_complete_as_the_english(page: Path) -> None:
    english = HELP / f"{page.parent.name}.md"
    assert page.stem in LANGUAGES and english.exists()  # the frontend asks for <node>/<language>.md, then for <node>.md
    assert listed(page) == listed(english)
    text, source = (path.read_text(encoding="utf-8") for path in (page, english))
    assert len(re.findall("^## ", text, re.MULTILINE)) == len(re.findall("^## ", source, re.MULTILINE))
    assert len(re.findall("^- ", text, re.MULTILINE)) == len(re.findall("^- ", source, re.MULTILINE))
    assert numbers(text) >= numbers(source), numbers(source) - numbers(text)


@pytest.mark.parametrize("language", LANGUAGES)
def test_the_readme_says_which_help_pages_are_translated(language: str) -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {page.parent.name for page in TRANSLATED_PAGES if page.stem == language} == \
        set(re.findall(rf"web/docs/(\w+)/{language}\.md", readme))
