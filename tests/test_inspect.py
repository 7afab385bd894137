"""`inspect` says what a file is, without reading a tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import released
import torch
from safetensors.torch import load_file, save_file

from dydit_core.checkpoints.convert import convert
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.inspect import describe
from dydit_core.demo.files import ADAPTER_FILE, BASE_FILE, VAE_FILE, WEIGHTS, adapter_file

TINY = "FLUX of width 16 with 2 double and 3 single blocks"
LORA = "lora_unet_single_blocks_0_linear1.lora_down.weight"


@pytest.fixture
def made(tmp_path: Path):
    return convert(released.save(tmp_path / "a.pt", released.tensors()), tmp_path)


def without_routers(found: dict) -> dict:
    return {key: value for key, value in found.items() if ".token_selection." not in key}


def test_a_released_file(tmp_path: Path) -> None:
    head, what, routers, remedy = describe(released.save(tmp_path / "a.pt", released.tensors()))
    assert head.startswith("a.pt: PyTorch file, ") and "tensors (" in head and "in BF16)" in head
    assert what == f"a {TINY}, in diffusers' layout" and routers == "with token routers in it"
    assert "python -m dydit_core convert" in remedy


def test_a_released_file_that_convert_would_refuse(tmp_path: Path) -> None:
    tensors = released.tensors()
    lost = next(key for key in tensors if key.endswith("router.bias"))
    del tensors[lost]
    *_, remedy = describe(released.save(tmp_path / "a.pt", tensors))
    assert "convert does not take it: " in remedy and "a.pt" in remedy and lost in remedy


@pytest.mark.parametrize("double, guided, name", [(19, True, "FLUX.1 dev"), (19, False, "FLUX.1 schnell"), (8, True, "FLUX.1-lite 8B")])
def test_models_that_everybody_has_are_named(tmp_path: Path, double: int, guided: bool, name: str) -> None:
    keys = {"img_in.weight": torch.zeros(3072, 1), f"double_blocks.{double - 1}.img_mlp.0.bias": torch.zeros(1),
            "single_blocks.37.linear1.bias": torch.zeros(1), **({"guidance_in.in_layer.bias": torch.zeros(1)} if guided else {})}
    save_file(keys, tmp_path / "flux.safetensors")
    assert describe(tmp_path / "flux.safetensors")[1].startswith(f"a FLUX of width 3072 with {double} double and 38 single blocks, as {name}, in ")


def test_what_convert_makes(made) -> None:
    _, what, without, loader = describe(made.base)
    assert what == f"a {TINY}, in Black Forest Labs' layout (ComfyUI)" and without == "without token routers"
    assert loader.endswith("Load Diffusion Model")
    _, what, fits, loader = describe(made.routers)
    assert what == 'token routers of the DyDiT authors, "Token routers of a"' and fits == f"fit a {TINY}"
    assert "DyDiT Adapter Loader" in loader and "256 text tokens" in loader


@pytest.mark.parametrize("naming", ["Black Forest Labs'", "diffusers'"])
def test_base_and_routers_in_one_file(tmp_path: Path, made, naming: str) -> None:
    found = released.tensors() if naming == "diffusers'" else load_file(made.base) | load_file(made.routers)
    save_file(found, tmp_path / "both.safetensors")
    _, what, routers, loader = describe(tmp_path / "both.safetensors")
    assert naming in what and TINY in what and routers == "with token routers in it" and "DyDiT Checkpoint Loader" in loader


def test_a_base_in_diffusers_layout(tmp_path: Path) -> None:
    save_file(without_routers(released.tensors()), tmp_path / "base.safetensors")
    _, what, routers, _ = describe(tmp_path / "base.safetensors")
    assert "diffusers' layout" in what and routers == "without token routers"


@pytest.mark.parametrize("file, words", [(ADAPTER_FILE, 'a DyDiT adapter, "DyDiT demo token router"'),
                                         (adapter_file("reuse"), "trained with reuse in place of what is skipped, at budgets 0.4, 0.5, 0.6, 0.75, 0.9"),
                                         (BASE_FILE, "single blocks, in Black Forest"),
                                         (VAE_FILE, "a VAE")])
def test_the_files_that_ship(file: str, words: str) -> None:
    assert any(words in line for line in describe(WEIGHTS / file))


@pytest.mark.parametrize("keys, words", [([LORA], "a LoRA, for FLUX"), (["unet.down.lora_A.weight"], "a LoRA, of another model"),
                                         (["encoder.conv_in.weight", "decoder.conv_in.weight", "decoder.conv_out.weight"], "a VAE"),
                                         (["a", "b"], "nothing this knows (a, b, …)"),
                                         (["double_blocks.0.token_selection.norm.weight"], "no FLUX is beside them")])
def test_other_files(tmp_path: Path, keys: list[str], words: str) -> None:
    save_file({key: torch.zeros(1) for key in keys}, tmp_path / "other.safetensors")
    assert words in describe(tmp_path / "other.safetensors")[1]


def test_a_dit_in_diffusers_layout(tmp_path: Path) -> None:
    """As facebook/DiT-XL-2-256 is laid out; `convert` hears the same."""
    block, path = "transformer_blocks.0", tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({key: torch.zeros(2, 2) for key in (
        "pos_embed.proj.weight", f"{block}.norm1.emb.timestep_embedder.linear_1.weight", f"{block}.norm1.emb.class_embedder.embedding_table.weight",
        f"{block}.attn1.to_q.weight", f"{block}.ff.net.0.proj.weight", "proj_out_1.weight")}, path)
    why = (f"{path.name} is a DiT in diffusers' layout ({block}.norm1.emb.class_embedder.embedding_table.weight); take the file of DiT's authors "
           "(DiT-XL-2-256x256.pt or DiT-XL-2-512x512.pt), and run python -m dydit_core convert on it.")
    assert describe(path)[1:] == ["a DiT, SiT, Latte or DyDiT", why]
    with pytest.raises(FileError) as caught:
        convert(path, tmp_path / "out.safetensors")
    assert str(caught.value) == why


def test_no_tensor_is_read(tmp_path: Path, made, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data of the file may as well not be there: what is said does not change."""
    for path in (made.base, made.routers):
        said = describe(path)
        size = int.from_bytes(path.read_bytes()[:8], "little") + 8
        path.write_bytes(path.read_bytes()[:size] + b"\xff" * (path.stat().st_size - size))
        assert describe(path) == said


def test_no_file_at_all(tmp_path: Path) -> None:
    with pytest.raises(FileError, match="gone.safetensors is not a file"):
        describe(tmp_path / "gone.safetensors")
