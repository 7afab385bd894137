"""Latte files: told from keys and shapes with the code for DiT's, and converted whole; Lattes of prompts are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_dit import december, shapes, source, tensors
from safetensors.torch import load_file
from test_dit_files import OFFICIAL_BLOCK, OFFICIAL_OUTSIDE, altered, one_sentence, saved, sentence, without

from dydit_core.checkpoints.contents import contents
from dydit_core.checkpoints.convert import convert
from dydit_core.checkpoints.dit import find_dit
from dydit_core.checkpoints.dit_adapter import dit_adapter
from dydit_core.checkpoints.dit_keys import RouterSizes
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.fit import Layout, layout_of
from dydit_core.checkpoints.inspect import describe
from dydit_core.checkpoints.source import open_source
from dydit_core.models.dit import DiT, DiTConfig
from dydit_core.models.latte import Latte, LatteConfig

OFFICIAL = Path(__file__).parent / "fixtures" / "latte_official.safetensors"
XL = LatteConfig(classes=101)
SMALL = LatteConfig(hidden_size=64, depth=4, num_heads=8, side=8, frames=6, classes=10)
ROUTERS = RouterSizes(heads=8, groups=8, hidden=4)


@pytest.mark.parametrize("classes, words", [(101, "101 classes"), (0, "unconditional")])
def test_the_released_lattes(classes: int, words: str) -> None:
    """Names and sizes as in the authors' class: those of a DiT and the positions in time."""
    official = {**OFFICIAL_OUTSIDE, "temp_embed": (1, 16, 1152), "y_embedder.embedding_table.weight": (classes + 1, 1152)}
    if not classes:
        del official["y_embedder.embedding_table.weight"]
    for block in range(28):
        for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "adaLN_modulation.1"):
            official |= {f"blocks.{block}.{layer}.weight": OFFICIAL_BLOCK[layer], f"blocks.{block}.{layer}.bias": OFFICIAL_BLOCK[layer][:1]}
    assert shapes(replace(XL, classes=classes), None) == official
    found = find_dit(source(replace(XL, classes=classes), name="0150000.pt"))
    assert found.config == replace(XL, classes=classes) and found.routers is None
    assert str(found) == f"Latte-XL/2, 16 frames of 256², 28 blocks (14 spatial, 14 temporal), {words}, no routers"


@pytest.mark.parametrize("width, depth, heads", [(384, 12, 6), (768, 12, 12), (1024, 24, 16), (1152, 28, 16)])
@pytest.mark.parametrize("patch, frames, side", [(2, 16, 32), (4, 8, 64), (8, 24, 32)])
def test_every_variant(width: int, depth: int, heads: int, patch: int, frames: int, side: int) -> None:
    config = LatteConfig(width, depth, heads, patch, side, frames, classes=7)
    assert find_dit(source(config)).config == config
    assert find_dit(source(config, RouterSizes(heads, heads, width // 16))).routers == RouterSizes(heads, heads, width // 16)


def test_heads_of_an_unknown_width() -> None:
    assert "its width of 64 parts (only 384, 768, 1024 and 1152 are known); say it" in sentence(source(SMALL))
    assert find_dit(source(SMALL, heads="8")).config == SMALL == find_dit(source(SMALL), heads=8).config
    four = LatteConfig(hidden_size=64, depth=2, num_heads=4, side=8, frames=2, in_channels=16, learned_variance=False, mlp_ratio=2.0)
    assert find_dit(source(four, heads="4")).config == four


@pytest.mark.parametrize("key", ["text_embedding_projection.1.weight", "temporal_transformer_blocks.0.attn1.to_q.weight"])
def test_lattes_of_prompts_are_refused(key: str) -> None:
    """The authors' `extras: 78`, and Latte-1 in diffusers' layout, which has no key of the others."""
    words = f"is a Latte that reads prompts ({key}); choose one of classes or an unconditional one"
    assert words in sentence(altered(source(replace(SMALL, classes=0), heads="8"), key, (64, 77 * 768)))
    alone = replace(source(SMALL), entries={key: source(SMALL).entries["pos_embed"]})
    assert words in sentence(alone)


def test_prompted_lattes_are_named_by_inspect(tmp_path: Path) -> None:
    _, what, why = describe(saved(tmp_path / "latte_1.pt", {"temporal_transformer_blocks.0.attn1.to_q.weight": torch.zeros(2, 2)}))
    assert what == "a DiT, SiT, Latte or DyDiT" and "is a Latte that reads prompts" in why


def test_a_latte_predicts_noise_unless_it_is_said_to_predict_the_velocity() -> None:
    assert find_dit(source(SMALL, heads="8")).known_by == "every Latte of its authors does"
    for found, said in ((source(SMALL, heads="8"), {"prediction": "flow"}), (source(SMALL, heads="8", prediction="flow"), {})):
        flow = find_dit(found, **said)
        assert flow.config == replace(find_dit(source(SMALL, heads="8")).config, prediction="flow") and flow.title.startswith("FlowLatte-")
    assert find_dit(source(SMALL, heads="8", prediction="flow"), prediction="eps").title.startswith("Latte-")
    assert "has prediction='v' in its metadata, which is neither eps nor flow" in sentence(source(SMALL, heads="8", prediction="v"))


@pytest.mark.parametrize("key, shape, words", [
    ("temp_embed", (6, 64), "is not a whole Latte: it lacks a tensor temp_embed of a fitting size"),
    ("temp_embed", (1, 0, 64), "is not a whole Latte: it lacks a tensor temp_embed of a fitting size"),
    ("temp_embed", (1, 6, 32), "lacks a tensor temp_embed of a fitting size"),
    ("final_layer.linear.weight", (12, 64), "makes 3 channels from 4, where a Latte makes as many"),
    ("y_embedder.embedding_table.weight", (0, 64), "lacks a tensor y_embedder.embedding_table.weight of a fitting size"),
    ("blocks.0.attn_temp.qkv.weight", (1,), "has a tensor blocks.0.attn_temp.qkv.weight that no DiT, SiT, Latte or DyDiT has")])
def test_a_wrong_tensor(key: str, shape: tuple[int, ...], words: str) -> None:
    assert words in sentence(altered(source(SMALL, heads="8"), key, shape))


def test_half_a_pair_of_blocks() -> None:
    assert "has 3 blocks, where a Latte has a temporal one after each spatial one" in sentence(source(replace(SMALL, depth=3), heads="8"))


def test_a_missing_block() -> None:
    assert "lacks the tensor blocks.3.attn.qkv.weight" in sentence(without(source(SMALL, heads="8"), "blocks.3.attn.qkv.weight"))


# --- converted

@pytest.mark.parametrize("kind, classes", [("class", 7), ("free", 0)])
def test_an_official_checkpoint_is_converted_and_draws_as_the_authors(tmp_path: Path, kind: str, classes: int) -> None:
    """Weights and output recorded from the authors' class, wrapped as their training wraps them."""
    recorded = {key.removeprefix(f"{kind}/"): value for key, value in load_file(OFFICIAL).items() if key.startswith(kind)}
    weights = {key.removeprefix("weights/"): value.float() for key, value in recorded.items() if key.startswith("weights/")}
    path = saved(tmp_path / "0010000.pt", {"model": {key: value + 1 for key, value in weights.items()}, "ema": weights})
    made = convert(path, tmp_path / "out.safetensors", heads=4)
    found = find_dit(open_source(made.base))
    assert found.config == LatteConfig(hidden_size=32, depth=4, num_heads=4, side=4, frames=3, classes=classes)
    assert dict(found.source.metadata) | {
        "prediction": "eps", "heads": "4", "classes": str(classes), "source": "0010000.pt, ema", "modelspec.architecture": "Latte-32×4/2"
    } == dict(found.source.metadata)
    model = Latte(found.config)
    model.load_state_dict({key: value.float() for key, value in found.tensors()})
    with torch.no_grad():
        out = model(recorded["x"].transpose(1, 2), recorded["t"], recorded["y"] if classes else None)
    assert (out.transpose(1, 2) - recorded["out"]).abs().max() < 1e-5 * recorded["out"].abs().max()


def test_what_is_let_into_a_checkpoint(tmp_path: Path) -> None:
    """Plain values beside the weights, as a training's own settings; a configuration of any library is code."""
    path = saved(tmp_path / "a.pt", {"ema": tensors(SMALL, None), "opt": {}, "train_steps": 10})
    assert find_dit(open_source(path), heads=8).config == SMALL
    with pytest.raises(FileError) as caught:
        convert(saved(path, {"ema": tensors(SMALL, None), "args": Settings()}), tmp_path / "out")
    assert "calls for code (" in one_sentence(str(caught.value), path)
    assert not [*tmp_path.glob("out/*")]


class Settings:
    """Stands for omegaconf's, which the authors' training is set up with."""


def test_inspect(tmp_path: Path) -> None:
    made = convert(saved(tmp_path / "a.pt", tensors(SMALL, ROUTERS)), tmp_path)
    assert contents(made.base).kind == "dit"
    assert describe(made.base)[1:] == [
        "DyLatte-64×4/2, 6 frames of 64², 4 blocks (2 spatial, 2 temporal), 10 classes, routers for 8 heads, 8 channel groups and tokens",
        "predicts eps: its metadata say so", "not calibrated: at a budget the first evaluation is dense (python -m dydit_core calibrate FILE OUT.safetensors)",
        "put it in models/diffusion_models and load it with DyDiT Checkpoint Loader"]


# --- with routers

@pytest.mark.parametrize("sizes", [ROUTERS, december(ROUTERS)])
def test_routers_are_those_of_dydit(tmp_path: Path, sizes: RouterSizes) -> None:
    given = tensors(SMALL, sizes)
    adapter = dit_adapter(find_dit(open_source(saved(tmp_path / "a.pt", given))), "moving", {})
    assert torch.equal(adapter.router.heads.weight[3], given["blocks.3.attn_rate.router.weight"])
    assert adapter.misfit(8, 256) is None and "decide 8 attention heads; this model has 4" in adapter.misfit(4, 256)


def test_an_adapter_of_pictures_is_not_one_of_videos(tmp_path: Path) -> None:
    """DiT-XL/2 and Latte-XL/2 have as many blocks of the same width."""
    adapter = dit_adapter(find_dit(open_source(saved(tmp_path / "a.pt", tensors(SMALL, ROUTERS)))), "moving", {})
    with torch.device("meta"):
        video, picture = Latte(SMALL), DiT(DiTConfig(hidden_size=64, depth=4, num_heads=8, side=8))
    assert adapter.fit.refusal(layout_of(video, 64)) is None
    assert adapter.fit.refusal(layout_of(picture, 64)) == (
        'the adapter "moving" was made for a Latte/2 of width 64 with 4 blocks; this model is a DiT/2 of width 64 with 4 blocks')
    assert layout_of(picture, 64) == Layout(64, 0, 4, "DiT/2")
