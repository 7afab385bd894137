from pathlib import Path

import pytest
import torch

from dydit_core.demo.checker import HEADS, Checker, accuracy, export_checker, fresh_scenes, labels, load_checker
from dydit_core.demo.data import draw
from dydit_core.demo.files import CHECKER_FILE, WEIGHTS
from dydit_core.demo.scenes import Scene, Thing


def test_labels_name_every_place() -> None:
    scene = Scene("night", "sea", (Thing("rocket", "white", "right"),))
    assert labels([scene]).tolist() == [[2, 3, 8, -100, 8, -100, 5, 7]]


def test_accuracy_counts_only_what_was_asked() -> None:
    class Stubborn(Checker):
        """Always answers: day, meadow, a red house on the left, nothing elsewhere."""

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            answers = (0, 0, 0, 0, 8, 0, 8, 0)
            return tuple(torch.eye(width)[answer].expand(len(images), -1) for width, answer in zip(HEADS, answers))

    scenes = [
        Scene("day", "meadow", (Thing("house", "red", "left"),)),
        Scene("night", "meadow", (Thing("house", "blue", "left"), Thing("tree", "red", "right"))),
    ]
    found = accuracy(torch.zeros(2, 3, 256, 256), scenes, Stubborn())
    expected = {"time": 1 / 2, "ground": 1.0, "kind": 2 / 3, "color": 2 / 3, "empty": 1.0}
    assert found == pytest.approx({**expected, "mean": sum(expected.values()) / 5})


def test_checker_file_is_small_and_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    checker, path = Checker().eval(), tmp_path / "checker.safetensors"
    export_checker(checker, path)
    images = torch.rand(2, 3, 256, 256)
    pairs = zip(checker(images), load_checker(path)(images))
    assert max((a - b).abs().max().item() for a, b in pairs) < 0.01
    assert path.stat().st_size < 1_000_000


@pytest.mark.skipif(not (WEIGHTS / CHECKER_FILE).exists(), reason="the demo's checker is not in this checkout")
def test_shipped_checker_knows_drawn_pictures() -> None:
    scenes = fresh_scenes(48)
    found = accuracy(draw(scenes), scenes, load_checker(WEIGHTS / CHECKER_FILE))
    assert min(found.values()) > 0.95 and found["mean"] > 0.97
