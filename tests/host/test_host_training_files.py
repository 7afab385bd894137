"""What training nodes write and make lists of: adapters, examples, prompts; and a graph of them in the host's executor."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import CONTEXT, POOLED, TEXT, adapter, as_node, prompt, wide_adapter  # first: starts the host
from queueing import queue
from trainings import folder, quick_and_clean  # noqa: F401 - the fixture works by being here

import folder_paths
import nodes as host_nodes
from comfy.cli_args import args
from comfy_api.latest import io
from dydit_pack.dydit_core.checkpoints.adapter import Adapter, load_adapter
from dydit_pack.dydit_core.demo.files import BASE_FILE, WEIGHTS
from dydit_pack.dydit_core.demo.prompt import encode
from dydit_pack.dydit_core.train.examples import load_examples
from dydit_pack.nodes import folders, save
from dydit_pack.nodes.adapter import DyDiTAdapterLoader
from dydit_pack.nodes.examples import LATENT
from dydit_pack.nodes.prompts import DyDiTPrompts
from dydit_pack.nodes.save import DyDiTSaveAdapter
from dydit_pack.nodes.save_examples import DyDiTSaveExamples
from dydit_pack.nodes.train import DyDiTTrain
from safetensors import safe_open


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that stands for models/dydit and output."""
    folders.register()
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "dydit", ([str(tmp_path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "get_output_directory", lambda: str(tmp_path))
    return tmp_path


def saved(thing: Any, prefix: str = "mine", **words: str) -> str:
    hidden = {io.Hidden.prompt: {"1": {}}, io.Hidden.extra_pnginfo: {"workflow": {"id": "w"}}}
    node = DyDiTSaveAdapter.PREPARE_CLASS_CLONE({"hidden_inputs": hidden})
    return node.EXECUTE_NORMALIZED(adapter=thing, filename_prefix=prefix, **words).result[0]


def tensors(one: Adapter) -> dict:
    low = {(*key, side): factor for side in ("down", "up") for key, factor in zip(one.low_rank.keys, getattr(one.low_rank, side))}
    return {**one.scores.state_dict(), **one.width.state_dict(), **low, "mix": one.low_rank.mix, "table": one.table.quantiles, "edges": one.table.edges}


def test_a_saved_adapter_is_loaded_as_it_was(here: Path) -> None:
    file = saved(wide_adapter(), "flux/mine", title="T", description="D", license="apache-2.0")
    assert file == "flux/mine_00001_.safetensors" and file in folder_paths.get_filename_list("dydit")
    loaded = as_node(DyDiTAdapterLoader).EXECUTE_NORMALIZED(adapter_name=file).result[0]
    first, second = tensors(wide_adapter()), tensors(loaded)
    assert first.keys() == second.keys() and all(torch.equal(value, second[key]) for key, value in first.items())
    assert (loaded.facts.title, loaded.facts.description, loaded.facts.license) == ("T", "D", "apache-2.0")
    with safe_open(here / file, "pt") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["workflow"]) == {"id": "w"} and json.loads(metadata["prompt"]) == {"1": {}}


def test_nothing_is_overwritten_and_empty_words_change_nothing(here: Path) -> None:
    assert [saved(adapter()) for _ in range(2)] == ["mine_00001_.safetensors", "mine_00002_.safetensors"]
    assert load_adapter(here / "mine_00002_.safetensors").facts == adapter().facts


def test_without_metadata_the_graph_stays_out_of_the_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(args, "disable_metadata", True)
    with safe_open(here / saved(adapter()), "pt") as opened:
        assert not {"workflow", "prompt"} & opened.metadata().keys()


@pytest.mark.parametrize("prefix", ["", "  ", "../mine", "/tmp/mine"])
def test_a_file_outside_the_folder_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match=rf'^DyDiT Save Adapter: filename_prefix is "{re.escape(prefix)}"; write a name'):
        saved(adapter(), prefix)


def test_routers_of_a_released_file_are_a_file_already() -> None:
    with pytest.raises(ValueError, match="^DyDiT Save Adapter: adapter holds no gates of DyDiT Train"):
        saved(object())


def test_a_full_disk_leaves_no_half_file(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, *more: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(save, "save_adapter", full)
    with pytest.raises(ValueError, match=r"mine_00001_.safetensors cannot be written \(No space left on device\); free some space"):
        saved(adapter())
    assert not list(here.iterdir())


def test_saved_examples_are_those_of_the_sockets() -> None:
    latents = [{"samples": torch.randn(1, 16, 4, 6)} for _ in range(2)]
    node = as_node(DyDiTSaveExamples)
    file, = node.EXECUTE_NORMALIZED(positive=[prompt(1), prompt(2)], negative=[prompt(3)], latents=latents, filename_prefix=["x"]).result
    examples = load_examples(Path(file))
    assert torch.equal(examples.conditioning[0], torch.cat([prompt(1)[0][0], prompt(2)[0][0]])) and torch.equal(examples.empty[1], prompt(3)[0][1]["pooled_output"])
    torch.testing.assert_close(examples.latents, LATENT.process_in(torch.cat([latent["samples"] for latent in latents])))


def test_one_prompt_for_many_pictures_and_no_negative() -> None:
    file, = as_node(DyDiTSaveExamples).EXECUTE_NORMALIZED(positive=[prompt(1)], latents=[{"samples": torch.randn(3, 16, 4, 4)}], filename_prefix=["x"]).result
    examples = load_examples(Path(file))
    assert examples.conditioning[0].shape == (3, TEXT, CONTEXT) and not examples.empty[0].any() and examples.empty[1].shape == (1, POOLED)


def test_prompts_in_the_words_of_the_demo() -> None:
    lines, = as_node(DyDiTPrompts).EXECUTE_NORMALIZED(prompts="a red house on the left\n\n  snow, night  \n").result
    assert len(lines) == 2 and torch.equal(lines[1][0][0][0], encode("snow, night").context)


def test_prompts_of_a_clip() -> None:
    class Clip:
        def tokenize(self, text: str) -> str:
            return text.upper()

        def encode_from_tokens_scheduled(self, tokens: str) -> list:
            return [[tokens, {}]]

    assert as_node(DyDiTPrompts).EXECUTE_NORMALIZED(prompts="a cat\na dog", clip=Clip()).result[0] == [[["A CAT", {}]], [["A DOG", {}]]]


@pytest.mark.parametrize("text, sentence", [(" \n ", "prompts is empty; write at least one line"),
                                            ("a red cat\na dog and a cat", 'the demo model does not know "cat" and "dog"; connect the CLIP')])
def test_prompts_that_cannot_be_read(text: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^DyDiT Prompts: {sentence}"):
        as_node(DyDiTPrompts).EXECUTE_NORMALIZED(prompts=text)


@pytest.mark.skipif(not (WEIGHTS / BASE_FILE).exists(), reason="the demo's weights are not in this checkout")
def test_a_graph_in_the_hosts_executor(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There models are loaded, and nodes run, in inference mode."""
    for node in (DyDiTPrompts, DyDiTTrain, DyDiTSaveAdapter, DyDiTSaveExamples):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
    wanted = {"steps": 1, "what": "tokens", "width": 64, "height": 64, "name": "g", "substitute": "reuse", "sampling_steps": "2", "runs": 2, "batch": 8,
              "learning_rate": 0.006, "cfg": 2.0, "seed": 0}
    queue({
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": BASE_FILE.name, "weight_dtype": "default"}},
        "2": {"class_type": "DyDiTPrompts", "inputs": {"prompts": "a red house on the left, day, meadow\na white lighthouse on the right, sea"}},
        "3": {"class_type": "DyDiTPrompts", "inputs": {"prompts": "sun"}},
        "4": {"class_type": "DyDiTTrain", "inputs": {"model": ["1", 0], "positive": ["2", 0], "negative": ["3", 0], **wanted}},
        "5": {"class_type": "DyDiTSaveAdapter", "inputs": {"adapter": ["4", 0], "filename_prefix": "g", "title": "", "description": "", "license": ""}},
        "6": {"class_type": "DyDiTSaveExamples", "inputs": {"positive": ["2", 0], "filename_prefix": "g/examples"}},
    })
    made = load_adapter(here / "g_00001_.safetensors")
    assert made.facts.title == "g" and made.facts.training["steps"] == 1
    assert len(load_examples(next((here / "g").iterdir()))) == 2
