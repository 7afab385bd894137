"""The adapter file: what is saved comes back, and every bad file is refused in one sentence."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dydit_core.checkpoints.adapter import Adapter, Facts, load_adapter, save_adapter
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.fit import Layout, sketch
from dydit_core.models.flux import Flux, FluxConfig
from dydit_core.routers.token import CapacityTable, TokenScores
from dydit_core.routers.width import new_width_scores
from dydit_core.td_lora import TimestepLoRA

DOUBLE, SINGLE, WIDTH, RANK, BINS, LEVELS = 2, 3, 128, 4, 5, 9


def tiny_flux() -> Flux:
    torch.manual_seed(0)
    return Flux(FluxConfig(WIDTH, DOUBLE, SINGLE, context_in_dim=8, vec_in_dim=8)).requires_grad_(False)


def adapter() -> Adapter:
    torch.manual_seed(1)
    table = CapacityTable(torch.randn(DOUBLE + SINGLE, BINS, LEVELS).sort(-1).values, torch.linspace(0.2, 1, BINS))
    facts = Facts(DOUBLE, SINGLE, WIDTH, "A router", substitutes=("nothing", "reuse"), budgets=(0.9, 0.5), date="2026-11-21",
                  base=sketch(tiny_flux()), training={"steps": 3, "loss": 0.5}, license="MIT", description="For tests.")
    return Adapter(facts, TokenScores(DOUBLE + SINGLE, WIDTH, RANK).requires_grad_(False), table)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_adapter(tmp_path / "router.safetensors", adapter())
    return tmp_path / "router.safetensors"


def rewrite(path: Path, tensors: dict | None = None, metadata: dict | None = None, without: str = "") -> None:
    """Save the file again with these tensors and metadata changed, and the key `without` left out."""
    with safe_open(path, framework="pt") as file:
        words = {**file.metadata(), **(metadata or {})}
    changed = {**load_file(path), **(tensors or {})}
    changed.pop(without, None)
    words.pop(without, None)
    save_file(changed, path, words)


def sentence(path: Path) -> str:
    """The one sentence that refuses `path`."""
    with pytest.raises(FileError) as caught:
        load_adapter(path)
    text = str(caught.value)
    assert text.startswith(path.name) and text.endswith(".") and "\n" not in text and "; " in text
    return text


def test_what_is_saved_comes_back(path: Path) -> None:
    saved, loaded = adapter(), load_adapter(path)
    assert loaded.facts == saved.facts
    for key, value in saved.scores.state_dict().items():
        assert torch.equal(loaded.scores.state_dict()[key], value)
    assert torch.equal(loaded.table.quantiles, saved.table.quantiles)
    assert torch.equal(loaded.table.edges, saved.table.edges)
    assert not any(param.requires_grad for param in loaded.scores.parameters())


def test_scores_that_see_change_come_back(path: Path) -> None:
    stale = TokenScores(DOUBLE + SINGLE, WIDTH, RANK, stale=True).requires_grad_(False)
    stale.stale.copy_(torch.arange(5.0))
    facts = replace(adapter().facts, substitutes=("reuse",))
    save_adapter(path, replace(adapter(), facts=facts, scores=stale))
    loaded = load_adapter(path)
    assert loaded.scores.stale.tolist() == [0, 1, 2, 3, 4] and loaded.router.stale and loaded.router.trained_for == "reuse"
    assert adapter().router.trained_for == "nothing" and not adapter().router.stale
    rewrite(path, metadata={"sketch": "32"})
    assert "compares 32 channels of each token, and this version 64; update" in sentence(path)


def test_the_file_carries_modelspec(path: Path) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    for key in ("sai_model_spec", "architecture", "implementation", "title", "description", "license", "date"):
        assert metadata[f"modelspec.{key}"]
    assert metadata["modelspec.architecture"] == "flux-1/dydit-adapter"


def test_the_architecture_is_that_of_the_base(tmp_path: Path) -> None:
    save_adapter(tmp_path / "video.safetensors", replace(adapter(), facts=replace(adapter().facts, kind="Latte/2")))
    with safe_open(tmp_path / "video.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.architecture"] == "latte/dydit-adapter"


def test_refusal_names_both_layouts() -> None:
    assert adapter().fit.refusal(Layout(WIDTH, DOUBLE, SINGLE)) is None
    for layout in ((256, DOUBLE, SINGLE), (WIDTH, 1, SINGLE), (WIDTH, DOUBLE, 38)):
        text = adapter().fit.refusal(Layout(*layout))
        assert f"width {WIDTH} with 2 double and 3 single" in text
        assert f"width {layout[0]} with {layout[1]} double and {layout[2]} single" in text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn])
def test_the_base_is_known_in_every_dtype(dtype: torch.dtype) -> None:
    model = tiny_flux()
    with torch.no_grad():
        for param in model.parameters():
            if param.ndim == 1:
                param.add_(torch.randn_like(param) * 0.1)
    known = replace(adapter(), facts=replace(adapter().facts, base=sketch(model)))
    assert known.fit.warning(model.to(dtype)) is None


@pytest.mark.parametrize("name", ["img_in.bias", "single_blocks.2.norm.key_norm.weight", "double_blocks.0.img_attn.norm.query_norm.weight"])
def test_other_weights_are_warned_of(name: str) -> None:
    model = tiny_flux()
    assert adapter().fit.warning(model) is None
    param = model.get_parameter(name)
    param.copy_(param * 1.3 + 0.1)
    assert name.removesuffix(".weight") in adapter().fit.warning(model)


def test_a_missing_file(tmp_path: Path) -> None:
    assert "is not a file" in sentence(tmp_path / "gone.safetensors")


@pytest.mark.parametrize("size", [0, 5, 8, 200, -1])
def test_a_truncated_file(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])
    assert "safetensors" in sentence(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_renamed_pytorch_file(path: Path, zipped: bool) -> None:
    torch.save({"weight": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    assert "PyTorch" in sentence(path)


def test_a_renamed_text_file(path: Path) -> None:
    path.write_text("<!doctype html><title>404</title>" * 10)
    assert "not a safetensors file" in sentence(path)


@pytest.mark.parametrize("metadata", [None, {"format": "pt", "ss_network_dim": "16"}])
def test_a_lora(path: Path, metadata: dict | None) -> None:
    save_file({"lora_unet_single_blocks_0_linear1.lora_down.weight": torch.zeros(4, 8)}, path, metadata)
    assert "no DyDiT adapter" in sentence(path)


def test_another_version(path: Path) -> None:
    rewrite(path, metadata={"version": "2"})
    assert "version '2'" in sentence(path)


@pytest.mark.parametrize("key", ["width", "rank", "double", "single", "family", "base", "substitutes", "budgets", "training", "modelspec.title",
                                 "scores.weight", "scores.down", "table.quantiles", "table.edges"])
def test_a_missing_key(path: Path, key: str) -> None:
    rewrite(path, without=key)
    assert f" {key}" in sentence(path)


@pytest.mark.parametrize("text", ["", "wide", "-128", "1e3", "128.0", "99999999999999999999", "٣", "0"])
def test_a_width_that_is_no_size(path: Path, text: str) -> None:
    rewrite(path, metadata={"width": text})
    assert "width=" in sentence(path)


@pytest.mark.parametrize("key, text", [("base", "[]"), ("base", '{"a": [1]}'), ("base", "{"), ("budgets", "0.5,x"), ("training", "3")])
def test_unreadable_metadata(path: Path, key: str, text: str) -> None:
    rewrite(path, metadata={key: text})
    assert f"key {key} " in sentence(path)


def test_an_extra_tensor(path: Path) -> None:
    rewrite(path, {"scores.extra": torch.zeros(1)})
    assert "scores.extra" in sentence(path)


@pytest.mark.parametrize("key, size", [("scores.weight", (5, 64)), ("scores.up", (5, 4, 128)), ("scores.bias", (5, 1)), ("table.edges", ()),
                                       ("table.edges", (4,)), ("table.quantiles", (4, 5, 9)), ("table.quantiles", ())])
def test_a_wrong_shape(path: Path, key: str, size: tuple[int, ...]) -> None:
    rewrite(path, {key: torch.zeros(size)})
    text = sentence(path)
    assert "of size" in text and ("table." in text if key.startswith("table.") else key in text)


def test_sizes_that_the_metadata_denies(path: Path) -> None:
    rewrite(path, metadata={"single": "4"})
    assert "scores.bias of size [5] where its metadata says [6]" in sentence(path)


@pytest.mark.parametrize("size", [(5, 5, 1), (5, 5, 0)])
def test_an_empty_table(path: Path, size: tuple[int, ...]) -> None:
    rewrite(path, {"table.quantiles": torch.zeros(size)})
    assert "empty capacity table" in sentence(path)


def test_a_wrong_dtype(path: Path) -> None:
    rewrite(path, {"scores.up": torch.zeros(5, 128, 4, dtype=torch.bfloat16)})
    assert "scores.up in BF16" in sentence(path)


@pytest.mark.parametrize("key", ["scores.bias", "table.edges"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite(path: Path, key: str, value: float) -> None:
    rewrite(path, {key: torch.full((5,), value)})
    assert f"{key} that are not finite" in sentence(path)


@pytest.mark.parametrize("key", ["table.edges", "table.quantiles"])
def test_a_table_that_falls(path: Path, key: str) -> None:
    rewrite(path, {key: load_file(path)[key].flip(-1)})
    assert f"{key} that does not rise" in sentence(path)


def test_the_header_is_checked_before_a_tensor_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of a wrong layout costs no memory: its tensors would be the first thing an attacker makes large."""
    rewrite(path, metadata={"base": json.dumps({}), "rank": "3"})
    monkeypatch.setattr(torch.Tensor, "clone", lambda *_: pytest.fail("a tensor was read"))
    assert "scores.down" in sentence(path)


def wide(heads: int = 2, groups: int = 16, hidden: int = 4 * WIDTH) -> Adapter:
    """The adapter with widths and a TD-LoRA on a fused layer."""
    factors = {(DOUBLE, "linear1"): (torch.randn(1, 2, WIDTH), torch.randn(3, 3 * WIDTH + hidden, 2))}
    low_rank = TimestepLoRA(factors, torch.randn(9, DOUBLE + SINGLE, 3), "sigmoid").requires_grad_(False)
    return replace(adapter(), width=new_width_scores(DOUBLE + SINGLE, heads, groups).requires_grad_(False), low_rank=low_rank)


def test_widths_and_low_rank_additions_come_back(tmp_path: Path) -> None:
    path, saved = tmp_path / "wide.safetensors", wide()
    save_adapter(path, saved)
    loaded = load_adapter(path)
    assert torch.equal(loaded.width.heads, saved.width.heads) and torch.equal(loaded.width.groups, saved.width.groups)
    assert loaded.low_rank.keys == saved.low_rank.keys and loaded.low_rank.gate == "sigmoid"
    for one, other in zip(loaded.low_rank.parameters(), saved.low_rank.parameters()):
        assert torch.equal(one, other)
    assert loaded.router.width is loaded.width and loaded.router.low_rank is loaded.low_rank


def test_a_model_with_other_heads_or_mlp_is_refused() -> None:
    assert wide().misfit(2, 4 * WIDTH) is None and adapter().misfit(7, 3) is None
    assert "was made for 2 attention heads; this model has 3" in wide().misfit(3, 4 * WIDTH)
    assert "16 channel groups, into which 500 MLP channels do not part" in wide().misfit(2, 500)
    assert "made for 512 MLP channels; this model has 1024" in wide().misfit(2, 1024)


@pytest.mark.parametrize("key, other", [("heads", "groups"), ("groups", "heads"), ("mlp", "experts")])
def test_half_of_the_sizes(tmp_path: Path, key: str, other: str) -> None:
    path = tmp_path / "wide.safetensors"
    save_adapter(path, wide())
    rewrite(path, without=key)
    assert f"has {other} in its metadata and lacks {key}" in sentence(path)


def test_widths_of_nothing(tmp_path: Path) -> None:
    path = tmp_path / "wide.safetensors"
    save_adapter(path, wide())
    rewrite(path, {"width.heads": torch.zeros(9, DOUBLE + SINGLE, 0)}, {"heads": "0"})
    assert "heads='0'" in sentence(path)


def test_words_for_other_programs_are_kept_beside_ours(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_adapter(path, adapter(), {"workflow": "{}", "family": "not ours"})
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["workflow"] == "{}"
    assert load_adapter(path).facts == adapter().facts


@pytest.mark.parametrize("spoil", [lambda one: one.scores.bias.fill_(torch.nan), lambda one: one.table.quantiles.fill_(torch.inf)])
def test_an_adapter_knows_whether_its_numbers_are_finite(spoil: Callable[[Adapter], object]) -> None:
    one = adapter()
    assert one.finite
    spoil(one)
    assert not one.finite
