"""What ships around the code: metadata, help pages, workflows, README, and the rules of the house. Needs no ComfyUI."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from dydit_core.demo.prompt import PAD, SYNONYMS, VOCABULARY, encode

ROOT = Path(__file__).parents[1]
FOLDERS = ("dydit_core", "nodes", "tests", "web")
CODE = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".js", ".mjs"}]
NODES = sorted(re.findall(r'node_id="(\w+)"', "".join(path.read_text() for path in (ROOT / "nodes").glob("*.py"))))
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "web/docs").rglob("*.md"))]
HOST_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "nodes", "server"}


def named(paths: list[Path]) -> list:
    return [pytest.param(path, id=str(path.relative_to(ROOT))) for path in paths]


def load(workflow: Path) -> tuple[dict, dict[int, dict]]:
    graph = json.loads(workflow.read_text())
    return graph, {node["id"]: node for node in graph["nodes"]}


# --- the rules of the house

def test_no_file_is_longer_than_400_lines():
    long = {str(path.relative_to(ROOT)): count for path in CODE if (count := len(path.read_text().splitlines())) > 400}
    assert not long, long


@pytest.mark.parametrize("path", named(sorted((ROOT / "dydit_core").rglob("*.py"))))
def test_the_core_imports_nothing_of_the_host(path):
    depth = len(path.relative_to(ROOT).parts) - 1  # folders up to the repository: more dots lead out of the core
    for statement in ast.walk(ast.parse(path.read_text())):
        if isinstance(statement, ast.Import):
            found = {alias.name.partition(".")[0] for alias in statement.names}
            assert not found & HOST_MODULES, f"line {statement.lineno}"
        elif isinstance(statement, ast.ImportFrom):
            assert statement.level <= depth, f"line {statement.lineno}"
            assert statement.level or statement.module.partition(".")[0] not in HOST_MODULES, f"line {statement.lineno}"


# --- metadata

def test_registry_metadata():
    project = pytest.importorskip("tomllib").loads((ROOT / "pyproject.toml").read_text())
    comfy = project["tool"]["comfy"]
    assert "comfyui" not in project["project"]["name"].lower()
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["project"]["version"])
    assert (ROOT / project["project"]["license"]["file"]).read_text().lstrip().startswith("Apache License")
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= comfy.keys()
    assert "web" not in comfy  # with WEB_DIRECTORY beside it every script would be served twice


def test_artists_install_nothing_but_comfyui():
    wanted = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert not wanted


# --- README

def test_continuous_integration_runs_the_readmes_test_command():
    command = "bash tests/run.sh"
    assert command in (ROOT / "README.md").read_text()
    assert (ROOT / ".ci/run").read_text().rstrip().endswith(f"exec {command}")


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)|(?:src|href)=\"([^\"#]+)\"", page.read_text())
    local = [target for pair in targets for target in pair if target and not re.match(r"[a-z]+:", target)]
    missing = [target for target in local if not (page.parent / target).exists()]
    assert not missing, missing


# --- help pages

def test_every_node_has_a_help_page():
    assert {path.stem for path in (ROOT / "web/docs").glob("*.md")} == set(NODES)
    assert len(NODES) == 14


def test_the_help_page_lists_the_demos_vocabulary():
    page = (ROOT / "web/docs/DyDiTScenePrompt.md").read_text()
    words = page.partition("## Its words")[2].partition("## ")[0]
    entries = re.findall(r"`(\w+)`(?: \(([^)]*)\))?", words)
    assert {word for word, _ in entries} == set(VOCABULARY) - {PAD}
    assert f"language\nof {len(VOCABULARY) - 1} words" in page
    assert {synonym: word for word, synonyms in entries for synonym in synonyms.split(", ") if synonym} == SYNONYMS


@pytest.mark.parametrize("place", ["web/docs/DyDiTScenePrompt.md", "nodes/prompt.py", "workflows/dydit_demo.json", "dydit_core/demo/page.py"])
def test_the_demo_understands_its_own_examples(place):
    text = (ROOT / place).read_text()
    examples = re.findall(r"[\"`]((?:a|an) [a-z ,]+)[\"`]", text)
    assert examples
    unknown = {example: words for example in examples if (words := encode(example).unknown_words)}
    assert not unknown, unknown


# --- workflows (that the host knows every node and value: tests/host/test_host_packaging.py)

def test_workflows_ship():
    assert {path.stem for path in WORKFLOWS} >= {"dydit_demo", "flux1_dev_budget"}


@pytest.mark.parametrize("path", named(WORKFLOWS))
def test_links_of_a_workflow_fit(path):
    graph, nodes = load(path)
    assert graph["last_node_id"] == max(nodes) and graph["last_link_id"] == max(link[0] for link in graph["links"])
    for link, source, output, target, port, kind in graph["links"]:
        assert link in nodes[source]["outputs"][output]["links"]
        assert nodes[target]["inputs"][port]["link"] == link
        assert nodes[source]["outputs"][output]["type"] == nodes[target]["inputs"][port]["type"] == kind


@pytest.mark.parametrize("path", named(WORKFLOWS))
def test_a_workflow_has_a_budget_a_note_and_a_small_thumbnail(path):
    _, nodes = load(path)
    kinds = [node["type"] for node in nodes.values()]
    assert "DyDiTBudget" in kinds and "MarkdownNote" in kinds
    assert {kind for kind in kinds if kind.startswith("DyDiT")} <= set(NODES)
    assert path.with_suffix(".jpg").stat().st_size < 60_000


@pytest.mark.parametrize("name", ["dydit_demo", "dydit_demo_classes", "dydit_demo_video"])
def test_a_demo_needs_only_files_that_ship(name):
    _, nodes = load(ROOT / f"workflows/{name}.json")
    values = [value for node in nodes.values() if node["type"] != "MarkdownNote" for value in node.get("widgets_values", [])]
    files = [value for value in values if str(value).endswith(".safetensors")]
    shipped = {path.name for path in (ROOT / "dydit_core/demo/weights").rglob("*.safetensors")}
    assert files and set(files) <= shipped
