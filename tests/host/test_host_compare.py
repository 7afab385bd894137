"""DyDiT Compare in the host: its numbers and words, and what it refuses, in a prompt as the API takes it."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace

import pytest
from tiny import as_node  # first: starts the host

import execution
import nodes as host_nodes
import torch
from comfy_extras.nodes_preview_any import PreviewAny
from dydit_pack.dydit_core.colours import cividis
from dydit_pack.nodes import compare
from dydit_pack.nodes.compare import DyDiTCompare
from torch import Tensor


def run(image: Tensor, reference: Tensor) -> tuple[Tensor, float, float, str]:
    return as_node(DyDiTCompare).EXECUTE_NORMALIZED(image=image, reference=reference).result


def grey(value: float, rows: int = 1, side: int = 16) -> Tensor:
    return torch.full((rows, side, side, 3), value)


def test_one_pair() -> None:
    difference, psnr, ssim, report = run(grey(0.55), grey(0.5))
    torch.testing.assert_close(difference, cividis(torch.full((1, 16, 16), 0.5)), atol=1e-5, rtol=0)
    assert difference.dtype == torch.float32 and psnr == pytest.approx(26.02, abs=0.01) and 0.9 < ssim < 1
    assert report.splitlines() == [
        "PSNR 26.0 dB: as a rule of thumb, differences that show at first sight.",
        f"SSIM {ssim:.4f}, where 1 is identical.",
        "Colours of the difference: dark blue is no difference, yellow is 10 % of the range from black to white, or more. "
        "The largest here is 5 %.",
    ]


def test_a_batch_names_its_worst() -> None:
    image = torch.cat([grey(0.51), grey(0.6), grey(0.5), grey(0.52)])
    difference, psnr, _, report = run(image, grey(0.5))
    assert difference.shape == (4, 16, 16, 3)
    assert psnr == pytest.approx(-10 * math.log10((0.01**2 + 0.1**2 + 0.02**2) / 4), abs=1e-3)
    assert report.startswith("PSNR 25.8 dB over 4 pictures:")
    assert "Farthest from its reference: picture 2 of 4, 20.0 dB." in report.splitlines() and len(report.splitlines()) == 4


@pytest.mark.parametrize("rows, of_all", [(1, "in every pixel (the"), (3, "in every pixel of all 3 pictures (the")])
def test_identical_is_a_word(rows: int, of_all: str) -> None:
    difference, psnr, ssim, report = run(grey(0.3, rows), grey(0.3, rows))
    assert (psnr, ssim) == (compare.CEILING, 1.0) == (100.0, 1.0)
    assert report.startswith("Identical: red, green and blue are the same") and of_all in report and "inf" not in report
    torch.testing.assert_close(difference, cividis(torch.zeros(rows, 16, 16)))


def test_nearly_identical_is_not_more_than_identical() -> None:
    _, psnr, ssim, report = run(grey(0.5), grey(0.500001))
    assert psnr == 100.0 and "PSNR 100 dB or more" in report and "SSIM 0.9999" in report and "less than 0.1 %" in report
    assert run(grey(0.5), grey(0.5001))[1] == pytest.approx(80, abs=0.1)
    _, psnr, _, report = run(grey(0.0), grey(1.0))
    assert psnr == 0 and "PSNR 0.0 dB" in report and "far apart" in report


@pytest.mark.parametrize("image, reference, words", [
    (grey(0.5), grey(0.5, side=32), "image is 16 × 16 pixels and reference is 32 × 32"),
    (grey(0.5, side=8), grey(0.5, side=8), "8 × 8 pixels"),
    (grey(0.5, 2), grey(0.5, 3), "a batch of 2"),
    (grey(0.5), grey(math.nan), "picture 1 of 1 at reference"),
])
def test_bad_input_is_a_sentence(image: Tensor, reference: Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        run(image, reference)
    sentence = str(caught.value)
    assert sentence.startswith("DyDiT Compare: ") and sentence.endswith(".") and "\n" not in sentence


def test_a_long_batch_is_taken_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And each picture moves the progress bar, which is where the host stops an interrupted run."""
    sizes, told, measure = [], [], compare.measure
    monkeypatch.setattr(compare, "measure", lambda *pair: sizes.append(pair[0].shape) or measure(*pair))
    monkeypatch.setattr(compare, "ProgressBar", lambda rows: SimpleNamespace(update=lambda count: told.append((count, rows))))
    run(grey(0.5, 5), grey(0.4, 5))
    assert sizes == [(3, 16, 16)] * 5 and told == [(1, 5)] * 5


def queue(monkeypatch: pytest.MonkeyPatch, side: int) -> list[tuple[str, dict]]:
    """What the host tells a client about a prompt that compares two grey pictures, of 64 and `side` pixels."""
    for node in (DyDiTCompare, PreviewAny):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    empty = {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 2, "color": 0x808080}}
    prompt = {
        "1": empty,
        "2": {"class_type": "EmptyImage", "inputs": {**empty["inputs"], "height": side, "color": 0x858585}},
        "3": {"class_type": "DyDiTCompare", "inputs": {"image": ["1", 0], "reference": ["2", 0]}},
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 3]}},
    }
    valid, error, outputs, _ = asyncio.run(execution.validate_prompt("p", prompt, None))
    assert valid, error
    told: list[tuple[str, dict]] = []
    server = SimpleNamespace(client_id=None, last_node_id=None, send_sync=lambda event, data, *_: told.append((event, data)))
    executor = execution.PromptExecutor(server, cache_args={"lru": 0, "ram": 0, "ram_inactive": 0})
    executor.execute(prompt, "p", {"client_id": "tab"}, outputs)
    return told


def test_a_prompt_from_the_api(monkeypatch: pytest.MonkeyPatch) -> None:
    (shown,) = [data["output"]["text"][0] for event, data in queue(monkeypatch, 64) if event == "executed"]
    assert shown.startswith("PSNR 34.2 dB over 2 pictures: as a rule of thumb, small differences")


def test_a_prompt_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    (error,) = [data for event, data in queue(monkeypatch, 32) if event == "execution_error"]
    assert error["node_id"] == "3" and error["exception_message"].strip() == (
        "DyDiT Compare: image is 64 × 64 pixels and reference is 64 × 32; resize one of them, or give both samplers the same "
        "Empty Latent Image.")
