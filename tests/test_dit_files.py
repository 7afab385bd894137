"""DiT, SiT and DyDiT files: told from keys and shapes, strictly, and converted whole."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import pytest
import released
import torch
from released_dit import SMALL, SMALL_ROUTERS, XL, XL_ROUTERS, december, shapes, source, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dydit_core.checkpoints import convert as converting
from dydit_core.checkpoints.convert import convert
from dydit_core.checkpoints.dit import find_dit
from dydit_core.checkpoints.dit_keys import RouterSizes, base_shapes
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.inspect import describe
from dydit_core.checkpoints.source import Entry, Source, open_source
from dydit_core.models.dit import DiT, DiTConfig

VARIANTS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
# As they stand in the authors' DyDiT-XL/2.
OFFICIAL_BLOCK = {
    "attn.qkv": (3456, 1152), "attn.proj": (1152, 1152), "mlp.fc1": (4608, 1152), "mlp.fc2": (1152, 4608), "adaLN_modulation.1": (6912, 1152),
    "attn_rate.router": (15, 1152), "mlp_rate.router": (15, 1152), "token_selection.mlp_head.0": (72, 1152), "token_selection.mlp_head.2": (1, 72)}
OFFICIAL_OUTSIDE = {
    "pos_embed": (1, 256, 1152), "x_embedder.proj.weight": (1152, 4, 2, 2), "x_embedder.proj.bias": (1152,), "t_embedder.mlp.0.weight": (1152, 256),
    "t_embedder.mlp.0.bias": (1152,), "t_embedder.mlp.2.weight": (1152, 1152), "t_embedder.mlp.2.bias": (1152,),
    "y_embedder.embedding_table.weight": (1001, 1152), "final_layer.linear.weight": (32, 1152), "final_layer.linear.bias": (32,),
    "final_layer.adaLN_modulation.1.weight": (2304, 1152), "final_layer.adaLN_modulation.1.bias": (2304,)}


def sentence(found: Source, **said: str | int) -> str:
    """The one sentence that refuses it."""
    with pytest.raises(FileError) as caught:
        find_dit(found, **said)
    return one_sentence(str(caught.value), found.path)


def one_sentence(text: str, path: Path) -> str:
    assert text.startswith(path.name) and text.endswith(".") and "\n" not in text and "; " in text
    return text


def without(found: Source, *keys: str) -> Source:
    return replace(found, entries={key: entry for key, entry in found.entries.items() if key not in keys})


def altered(found: Source, key: str, shape: tuple[int, ...], dtype: str = "F32") -> Source:
    return replace(found, entries={**found.entries, key: Entry(key, dtype, shape)})


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


# --- told from shapes

def test_the_released_dydit() -> None:
    """Names and sizes as in the authors' class (March 2025)."""
    official = dict(OFFICIAL_OUTSIDE)
    for block in range(28):
        for layer, shape in OFFICIAL_BLOCK.items():
            official |= {f"blocks.{block}.{layer}.weight": shape, f"blocks.{block}.{layer}.bias": shape[:1]}
    assert shapes(XL, XL_ROUTERS) == official and len(official) == 516
    assert sum(torch.Size(shape).numel() for shape in official.values()) == 678_424_644
    found = find_dit(Source(Path("new_dydit0.5.pt"), {key: Entry(key, "F32", shape) for key, shape in official.items()}, {}))
    assert found.config == XL and found.routers == XL_ROUTERS
    assert str(found) == "DyDiT-XL/2, 256², 28 blocks, 1000 classes, routers for 16 heads, 16 channel groups and tokens"
    assert len(found.keys) == 292 and len(found.router_keys) == 224


@pytest.mark.parametrize("patch, side", [(2, 32), (4, 32), (8, 32), (2, 64)])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str, patch: int, side: int) -> None:
    width, depth, heads = VARIANTS[name]
    config = DiTConfig(width, depth, heads, patch, side)
    found = find_dit(source(config), prediction="eps")
    assert found.config == config and found.routers is None
    assert str(found) == f"DiT-{name}/{patch}, {8 * side}², {depth} blocks, 1000 classes, no routers"


@pytest.mark.parametrize("name", VARIANTS)
def test_both_layouts_of_the_routers(name: str) -> None:
    width, depth, heads = VARIANTS[name]
    config, march = DiTConfig(width, depth, heads), RouterSizes(heads, heads, width // 16)
    for sizes in (march, december(march)):
        found = find_dit(source(config, sizes))
        assert found.config == config and found.routers == sizes


def test_sizes_of_ones_own() -> None:
    config = DiTConfig(192, 7, 8, patch_size=4, side=16, in_channels=16, classes=12, learned_variance=False, mlp_ratio=3.0)
    found = find_dit(source(config, RouterSizes(8, 4, 10), heads="8", prediction="flow", classes=json.dumps([f"class {n}" for n in range(12)])))
    assert found.config == replace(config, prediction="flow") and found.routers == RouterSizes(8, 4, 10)
    assert found.title == "DySiT-192×7/4" and found.class_names == tuple(f"class {n}" for n in range(12))


def test_an_mlp_that_is_no_round_multiple_of_the_width() -> None:
    config = DiTConfig(448, 2, 8, side=16, classes=5, mlp_ratio=1952 / 448)
    assert base_shapes(config)["blocks.0.mlp.fc1.weight"] == (1952, 448)
    assert find_dit(source(config, heads="8", prediction="eps")).config == config


# --- heads, which are not in the shapes of a plain DiT

def test_heads_of_an_unknown_width() -> None:
    plain = source(SMALL, prediction="eps")
    assert "its width of 64 parts (only 384, 768, 1024 and 1152 are known); say it" in sentence(plain)
    assert find_dit(plain, heads=8).config == SMALL
    assert find_dit(replace(plain, metadata={"heads": "4", "prediction": "eps"})).config.num_heads == 4
    assert "a width of 64, which does not part into 7 heads" in sentence(plain, heads=7)
    assert "into -8 heads" in sentence(plain, heads=-8)


def test_routers_tell_the_heads_of_an_unknown_width() -> None:
    for sizes in (SMALL_ROUTERS, december(SMALL_ROUTERS)):
        found = find_dit(source(SMALL, sizes))
        assert found.config == SMALL and found.routers == sizes


def test_routers_that_may_mean_two_things() -> None:
    config = replace(SMALL, hidden_size=48)
    three = RouterSizes(3, 3, 4, always_on=False)
    found = source(config, three)
    assert "--heads 3 (or 4)" in sentence(found) and "may stand for 3 heads or, the first being always on, for 4" in sentence(found)
    assert find_dit(found, heads=3).routers == three
    assert find_dit(found, heads=4).routers == RouterSizes(4, 4, 4)
    assert find_dit(replace(found, metadata={"heads": "4"})).routers == RouterSizes(4, 4, 4)
    assert "which do not fit 6 heads; its heads are 3 or 4" in sentence(found, heads=6)


def test_routers_that_fit_nothing() -> None:
    found = source(SMALL, RouterSizes(11, 11, 4, always_on=False))
    assert "into which neither its width of 64 nor its MLP of 256 channels parts" in sentence(found)


@pytest.mark.parametrize("text", ["0", "-8", "٨", "eight", "8" * 20])
def test_metadata_heads_that_are_no_number(text: str) -> None:
    assert "in its metadata, which is not a number of heads" in sentence(source(SMALL, prediction="eps", heads=text))


# --- eps or flow, which is not in the shapes at all

@pytest.mark.parametrize("name, prediction", [("DiT-XL-2-256x256.pt", "eps"), ("DiT-XL-2-512x512.pt", "eps"),
                                              ("SiT-XL-2-256x256.pt", "flow"), ("SiT-XL-2-256.pt", "flow")])
def test_files_that_are_called_as_the_authors(name: str, prediction: str) -> None:
    found = find_dit(source(XL, name=name))
    assert found.config == replace(XL, prediction=prediction) and found.known_by == "it is called as the authors' file"
    assert find_dit(source(XL, name=name), prediction="flow").config.prediction == "flow"


def test_a_plain_file_that_does_not_say() -> None:
    text = sentence(source(XL, name="model.pt"))
    assert "is DiT-XL/2 or its SiT twin" in text and "--prediction eps (DiT; " in text and "--prediction flow (SiT; SiT-XL-2-256x256)" in text


def test_routers_alone_do_not_say_it_of_a_file_of_ones_own() -> None:
    """The authors' DyDiT-XL/2 have a learned variance; a DySiT that was trained here has none."""
    assert find_dit(source(XL, XL_ROUTERS)).known_by == "DyDiT's authors released DiTs alone"
    assert "is DyDiT-XL/2 or its SiT twin" in sentence(source(replace(XL, learned_variance=False), XL_ROUTERS, name="sit.pt"))


@pytest.mark.parametrize("arguments, prediction", [({"model": "DiT-XL/2"}, "eps"),
                                                   ({"model": "SiT-XL/2", "path_type": "Linear", "prediction": "velocity"}, "flow")])
def test_training_arguments_in_the_file(arguments: dict, prediction: str) -> None:
    found = find_dit(source(XL, name="0050000.pt", arguments=arguments))
    assert found.config.prediction == prediction and f"--model {arguments['model']}" in found.known_by


def test_a_sit_of_another_kind() -> None:
    found = source(XL, arguments={"model": "SiT-XL/2", "path_type": "GVP", "prediction": "score"})
    assert "along the path GVP to predict score" in sentence(found)


def test_the_metadata_say() -> None:
    assert find_dit(source(XL, prediction="flow")).title == "SiT-XL/2"
    assert "prediction='x0' in its metadata, which is neither eps nor flow" in sentence(source(XL, prediction="x0"))
    assert find_dit(source(XL, XL_ROUTERS)).config.prediction == "eps"


@pytest.mark.parametrize("text, words", [("[1, 2]", "neither names nor a number"), ("true", "neither names nor a number"), ("{", "neither names nor a number"),
                                         ('["a"]', "has 1 classes in its metadata and 10 in its tensors"), ("11", "has 11 classes")])
def test_metadata_classes_that_do_not_fit(text: str, words: str) -> None:
    assert words in sentence(source(SMALL, SMALL_ROUTERS, classes=text))


# --- tensors that do not belong together

@pytest.mark.parametrize("key", ["pos_embed", "blocks.1.attn.qkv.bias", "blocks.0.mlp.fc1.weight", "final_layer.linear.weight",
                                 "t_embedder.mlp.2.weight", "y_embedder.embedding_table.weight", *(
                                     f"blocks.{block}.{part}" for block in (0, 1) for part in (
                                         "attn_rate.router.weight", "mlp_rate.router.bias", "token_selection.mlp_head.0.weight", "token_selection.mlp_head.2.bias"))])
def test_a_missing_tensor(key: str) -> None:
    assert key in (text := sentence(without(source(SMALL, SMALL_ROUTERS), key))) and "lacks a" in text.replace("lacks the", "lacks a")


def test_a_block_without_routers() -> None:
    found = source(SMALL, SMALL_ROUTERS)
    lost = [key for key in found.entries if key.startswith("blocks.1.") and ("router" in key or "token_selection" in key)]
    assert len(lost) == 8 and "lacks the tensor blocks.1.attn_rate.router.weight" in sentence(without(found, *lost))


@pytest.mark.parametrize("key", ["blocks.0.attn.q_norm.weight", "blocks.0.moe.gate.weight", "projectors.0.weight", "pos_embed_2"])
def test_a_surplus_tensor(key: str) -> None:
    assert f"has a tensor {key} that no DiT, SiT, Latte or DyDiT has" in sentence(altered(source(SMALL, SMALL_ROUTERS), key, (1,)))


def test_a_block_number_that_is_made_up() -> None:
    assert "lacks the tensor blocks.2." in sentence(altered(source(SMALL, SMALL_ROUTERS), "blocks.9999.attn.qkv.bias", (192,)))


@pytest.mark.parametrize("key, shape, words", [
    ("blocks.1.mlp.fc1.weight", (128, 64), "[128, 64] where its other tensors say [256, 64]"),
    ("blocks.1.attn_rate.router.weight", (8, 64), "[8, 64] where its other tensors say [7, 64]"),
    ("t_embedder.mlp.0.weight", (64, 128), "[64, 128] where its other tensors say [64, 256]"),
    ("pos_embed", (1, 15, 64), "positions for 15 tokens (pos_embed), which are no square"),
    ("pos_embed", (16, 64), "lacks a tensor pos_embed of a fitting size"),
    ("pos_embed", (1, 10**12, 0), "lacks a tensor pos_embed of a fitting size"),
    ("pos_embed", (1, 10**6, 1), "lacks a tensor pos_embed of a fitting size"),
    ("y_embedder.embedding_table.weight", (1, 64), "knows no class"),
    ("final_layer.linear.weight", (12, 64), "makes 3 channels from 4"),
    ("x_embedder.proj.weight", (64, 4, 2, 0), "x_embedder.proj.weight of size [64, 4, 2, 0]"),
    ("x_embedder.proj.weight", (64, 4, 0, 2), "lacks a tensor x_embedder.proj.weight of a fitting size"),
    ("blocks.0.attn_rate.router.weight", (0, 64), "lacks a tensor blocks.0.attn_rate.router.weight of a fitting size")])
def test_a_wrong_shape(key: str, shape: tuple[int, ...], words: str) -> None:
    assert words in sentence(altered(source(SMALL, SMALL_ROUTERS), key, shape))


def test_a_wrong_type() -> None:
    found = source(SMALL, SMALL_ROUTERS)
    assert "blocks.0.mlp.fc2.bias in I8, and tensors of the model are" in sentence(altered(found, "blocks.0.mlp.fc2.bias", (64,), "I8"))
    assert "must be of one type" in sentence(altered(found, "blocks.0.mlp.fc2.bias", (64,), "F16"))


# --- converted

def test_a_training_checkpoint_becomes_one_file(tmp_path: Path) -> None:
    given, last = tensors(), {key: value + 1 for key, value in tensors().items()}
    path = saved(tmp_path / "0030000.pt", {"model": last, "ema": given, "opt": {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 1e-4}]},
                                           "args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)})
    made = convert(path, tmp_path / "out" / "small.safetensors")
    assert made.base == tmp_path / "out" / "small.safetensors" and made.routers is None
    found = load_file(made.base)
    assert found.keys() == given.keys() and all(torch.equal(found[key], given[key]) for key in given)
    with safe_open(made.base, framework="pt") as file:
        words = file.metadata()
    assert {key: words[key] for key in ("format", "prediction", "heads", "classes", "source", "modelspec.title", "modelspec.architecture")} == {
        "format": "pt", "prediction": "eps", "heads": "8", "classes": "10", "source": "0030000.pt, ema", "modelspec.title": "0030000",
        "modelspec.architecture": "DyDiT-64×2/2"}
    assert "CC BY-NC 4.0" in words["modelspec.license"]
    again = find_dit(open_source(made.base))
    assert again.config == SMALL and again.routers == SMALL_ROUTERS and again.known_by == "its metadata say so"


@pytest.mark.parametrize("wrapped, under", [(lambda found: found, ""), (lambda found: {"ema": found}, "ema"), (lambda found: {"model": found, "opt": {}}, "model"),
                                            (lambda found: {"model": {f"module.{key}": value for key, value in found.items()}}, "model")])
def test_wrapped_files(tmp_path: Path, wrapped, under: str) -> None:
    made = convert(saved(tmp_path / "a.pt", wrapped(tensors())), tmp_path)
    assert made.base == tmp_path / "a.safetensors" and made.dit.source.under == under
    assert all(torch.equal(load_file(made.base)[key], value) for key, value in tensors().items())


def test_the_model_takes_what_was_converted(tmp_path: Path) -> None:
    made = convert(saved(tmp_path / "sit.pt", tensors(routers=None)), tmp_path, prediction="flow", heads=8)
    found = find_dit(open_source(made.base))
    assert found.config == replace(SMALL, prediction="flow") and found.title == "SiT-64×2/2"
    model = DiT(found.config)
    model.load_state_dict(dict(found.tensors()))
    out = model(torch.randn(1, 4, 8, 8), torch.zeros(1), torch.tensor([3]))
    assert out.shape == (1, 8, 8, 8) and out.isfinite().all()


@pytest.mark.parametrize("sizes", [SMALL_ROUTERS, december(SMALL_ROUTERS)])
def test_routers_are_read_block_by_block(tmp_path: Path, sizes: RouterSizes) -> None:
    given = tensors(routers=sizes, dtype=torch.bfloat16)
    routers = find_dit(open_source(saved(tmp_path / "a.pt", given))).read_routers()
    assert (routers.head_count, routers.group_count) == (8, 8)
    parts = {"attn_rate.router": routers.heads, "mlp_rate.router": routers.groups}
    for block in range(2):
        for name, part in parts.items():
            assert torch.equal(part.weight[block], given[f"blocks.{block}.{name}.weight"].float())
            assert torch.equal(part.bias[block], given[f"blocks.{block}.{name}.bias"].float())
        mlp, tokens = f"blocks.{block}.token_selection.mlp_head", routers.tokens
        for found, key in ((tokens.down, f"{mlp}.0.weight"), (tokens.down_bias, f"{mlp}.0.bias"), (tokens.up[:, None], f"{mlp}.2.weight"), (tokens.up_bias[:, None], f"{mlp}.2.bias")):
            assert torch.equal(found[block], given[key].float())
    assert not any(value.requires_grad for part in (*parts.values(), routers.tokens) for value in part.parameters())
    always_on = routers.heads(torch.randn(1, 64), 8)[0, :, 0].isinf()
    assert always_on.all() if sizes.always_on else not always_on.any()


def test_a_plain_file_has_no_routers_to_read() -> None:
    assert find_dit(source(XL, prediction="eps")).read_routers() is None


def test_routers_that_are_not_finite(tmp_path: Path) -> None:
    given = tensors()
    given["blocks.1.mlp_rate.router.bias"][2] = float("inf")
    with pytest.raises(FileError, match="numbers in blocks.1.mlp_rate.router.bias that are not finite"):
        find_dit(open_source(saved(tmp_path / "a.pt", given))).read_routers()


def test_a_file_that_is_converted_keeps_what_it_says(tmp_path: Path) -> None:
    names = json.dumps([f"class {n}" for n in range(10)])
    save_file(tensors(dtype=torch.float16), tmp_path / "a.safetensors", {"classes": names, "heads": "8", "prediction": "flow", "modelspec.title": "Scenes"})
    made = convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", prediction="eps")
    with safe_open(made.base, framework="pt") as file:
        words = file.metadata()
    assert (words["classes"], words["modelspec.title"], words["prediction"]) == (names, "Scenes", "eps")
    assert load_file(made.base)["pos_embed"].dtype == torch.float16


def refused(path: Path, out: Path, **said: str | int) -> str:
    with pytest.raises(FileError) as caught:
        convert(path, out, **said)
    assert not [*out.glob("*.safetensors*")]
    return one_sentence(str(caught.value), path)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    given = tensors()
    given["blocks.1.token_selection.mlp_head.2.bias"][0] = float("nan")
    assert "numbers in blocks.1.token_selection.mlp_head.2.bias that are not finite" in refused(saved(tmp_path / "a.pt", {"ema": given}), tmp_path / "out")


class Malicious:
    def __reduce__(self) -> tuple:
        return (eval, ("__import__('pathlib').Path('/tmp/dydit-dit-was-here').touch()",))


@pytest.mark.parametrize("args", [Malicious(), argparse.Namespace(hidden=Malicious()), Path("/tmp")])
def test_pickles_with_code(tmp_path: Path, args: object) -> None:
    assert "calls for code (" in refused(saved(tmp_path / "a.pt", {"ema": tensors(), "args": args}), tmp_path / "out")
    assert not Path("/tmp/dydit-dit-was-here").exists()


@pytest.mark.parametrize("content", [{"opt": {}, "args": argparse.Namespace()}, {"ema": {}}, {"ema": {"pos_embed": [1]}}, argparse.Namespace(model=1)])
def test_pickles_without_a_model(tmp_path: Path, content: object) -> None:
    text = refused(saved(tmp_path / "a.pt", content), tmp_path / "out")
    assert "not a plain tensor" in text or "where named tensors are expected" in text


def test_a_file_is_not_written_over_itself(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    for out in (tmp_path, tmp_path / "a.safetensors"):
        with pytest.raises(FileError, match="would be written over itself; name another file"):
            convert(tmp_path / "a.safetensors", out)
    assert (tmp_path / "a.safetensors").read_bytes() == before


def test_a_flux_is_two_files(tmp_path: Path) -> None:
    path = released.save(tmp_path / "a.pt", released.tensors())
    assert "becomes two files, and out.safetensors is one; name a folder" in refused(path, tmp_path / "out.safetensors")


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = saved(tmp_path / "a.pt", {"ema": tensors()})
    converting.run(argparse.Namespace(file=path, out=tmp_path / "b.safetensors", prediction=None, heads=None))
    said = capsys.readouterr().out
    assert "DyDiT-64×2/2, 64², 2 blocks, 10 classes, routers for 8 heads, 8 channel groups and tokens, for models/diffusion_models (DyDiT Checkpoint Loader)" in said
    assert 'predicts eps: DyDiT\'s authors released DiTs alone; of the file\'s weights those under "ema" were taken' in said


# --- inspected

def test_inspect_a_training_checkpoint(tmp_path: Path) -> None:
    head, what, predicts, under, remedy = describe(saved(tmp_path / "a.pt", {"ema": tensors()}))
    assert head.startswith("a.pt: PyTorch file, ") and head.endswith(f"{len(shapes())} tensors ({len(shapes())} in F32)")
    assert what == "DyDiT-64×2/2, 64², 2 blocks, 10 classes, routers for 8 heads, 8 channel groups and tokens"
    assert predicts.startswith("predicts eps: ") and under == 'its weights are those under "ema"'
    assert remedy == "python -m dydit_core convert FILE OUT.safetensors makes a file of it that ComfyUI loads"


def test_inspect_what_convert_makes(tmp_path: Path) -> None:
    made = convert(saved(tmp_path / "a.pt", tensors()), tmp_path)
    said = describe(made.base)
    assert said[1].startswith("DyDiT-64×2/2") and said[-1].endswith("load it with DyDiT Checkpoint Loader")
    # No tensor is read: the data of the file may as well not be there.
    size = int.from_bytes(made.base.read_bytes()[:8], "little") + 8
    made.base.write_bytes(made.base.read_bytes()[:size] + b"\xff" * (made.base.stat().st_size - size))
    assert describe(made.base) == said


def test_inspect_a_file_that_needs_a_word(tmp_path: Path) -> None:
    _, what, why = describe(saved(tmp_path / "a.pt", tensors(routers=None)))
    assert what == "a DiT, SiT, Latte or DyDiT" and "--heads NUMBER" in why
