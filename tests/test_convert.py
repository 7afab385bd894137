"""`convert`: every tensor of a released file arrives where it belongs, memory stays small, and bad files are refused."""

from __future__ import annotations

import argparse
import io
import json
import shutil
import struct
import subprocess
import sys
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import released
import torch
from released import SMALL
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit_core.checkpoints import convert as converting
from dydit_core.checkpoints import stream
from dydit_core.checkpoints.convert import convert
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.fit import Layout, sketch
from dydit_core.checkpoints.flux_keys import base_keys
from dydit_core.checkpoints.routers import load_routers
from dydit_core.models.flux import Flux, FluxConfig, from_file_key

ROUTER_OF_THE_FIRST_SINGLE_BLOCK = "single_transformer_blocks.0.token_selection.router.weight"


def sentence(path: Path, folder: Path) -> str:
    """The one sentence that refuses `path`; nothing is left in `folder`."""
    with pytest.raises(FileError) as caught:
        convert(path, folder)
    text = str(caught.value)
    assert text.startswith(path.name) and text.endswith(".") and "\n" not in text and "; " in text
    assert not [*folder.glob("*.safetensors")] and not [*folder.glob("*.partial")]
    return text


def refused(tmp_path: Path, found: dict) -> str:
    return sentence(released.save(tmp_path / "bad.pt", found), tmp_path / "out")


def changed(**more: Tensor) -> dict[str, Tensor]:
    return released.tensors() | {key.replace("__", "."): value for key, value in more.items()}


def test_the_released_layout() -> None:
    """Numbers of the authors' class, instantiated with diffusers 0.30.3."""
    shapes = released.shapes(released.RELEASED)
    assert len(shapes) == 1084 and sum(".token_selection." in key for key in shapes) == 276
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 9_900_695_150


def test_every_tensor_of_the_full_key_set_arrives(tmp_path: Path) -> None:
    sizes = replace(SMALL, layout=Layout(16, 8, 38))
    given = released.tensors(sizes)
    assert len(given) == 1084
    made = convert(released.save(tmp_path / "transformer_1.pt", given), tmp_path / "out")
    base, routers = load_file(made.base), load_file(made.routers)
    assert len(routers) == 276
    for key, value in routers.items():
        stack, rest = key.split("_blocks.", 1)
        assert torch.equal(value, given.pop(f"{'single_' if stack == 'single' else ''}transformer_blocks.{rest}")), key
    for key, parts in base_keys(sizes).items():
        rows = base[key].split([given[part].shape[0] for part in parts])
        for part, value in zip(parts, rows):
            expected = given.pop(part)
            assert torch.equal(value, expected.roll(16, 0) if "norm_out" in part else expected), part
    assert not given and base.keys() == base_keys(sizes).keys()


def test_the_base_is_what_our_flux_holds(tmp_path: Path) -> None:
    sizes = replace(SMALL, layout=Layout(128, 2, 3), patch=64, embedding=256, head=128, hidden=512)
    made = convert(released.save(tmp_path / "a.pt", released.tensors(sizes)), tmp_path)
    with torch.device("meta"):
        model = Flux(FluxConfig(128, 2, 3, context_in_dim=12, vec_in_dim=10, guidance_embed=True))
    loaded = {from_file_key(key): value for key, value in load_file(made.base).items()}
    model.load_state_dict(loaded, assign=True)
    routers = load_routers(made.routers)
    assert routers.fit.layout == Layout(128, 2, 3) and routers.fit.warning(model) is None
    assert routers.fit.base == sketch(model) and len(routers.fit.base) == 4 + 2 * 5


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    convert(released.save(tmp_path / "a.pt", released.tensors()), tmp_path, lambda *numbers: told.append(numbers))
    done = [part for part, _ in told]
    assert done == sorted(done) and told[-1] == (2 * sum(value.numel() for value in released.tensors().values()),) * 2


def test_what_the_router_file_says(tmp_path: Path) -> None:
    made = convert(released.save(tmp_path / "transformer_1.pt", released.tensors()), tmp_path)
    with safe_open(made.routers, framework="pt") as file:
        words = file.metadata()
    assert {key: words[key] for key in ("format", "version", "width", "double", "single", "text_tokens", "threshold", "dtype")} == {
        "format": "dydit-flux-routers", "version": "1", "width": "16", "double": "2", "single": "3", "text_tokens": "256",
        "threshold": "0.5", "dtype": "BF16"}
    assert words["modelspec.title"] == "Token routers of transformer_1" and words["modelspec.sai_model_spec"] == "1.0.1"
    weights = load_routers(made.routers).read(2)  # the first single block
    assert torch.equal(weights.vector, released.tensors()[ROUTER_OF_THE_FIRST_SINGLE_BLOCK])
    assert weights.linear.shape == (64, 16)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_all_keys_are_dropped(tmp_path: Path, prefix: str) -> None:
    plain = convert(released.save(tmp_path / "a.pt", released.tensors()), tmp_path / "plain")
    found = {prefix + key: value for key, value in released.tensors().items()}
    prefixed = convert(released.save(tmp_path / "a.pt", found), tmp_path / "prefixed")
    for one, other in ((plain.base, prefixed.base), (plain.routers, prefixed.routers)):
        assert one.read_bytes() == other.read_bytes()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_safetensors_file_in_diffusers_layout(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file(released.tensors(dtype=dtype), tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", tmp_path)
    assert load_file(made.base)["single_blocks.2.linear1.weight"].shape == (112, 16)
    assert load_file(made.routers)["double_blocks.1.token_selection.norm.weight"].dtype == dtype


def test_views_and_tensors_that_share_memory(tmp_path: Path) -> None:
    given = released.tensors()
    key = "transformer_blocks.0.ff.net.2.weight"
    given[key] = given[key].T.contiguous().T
    made = convert(released.save(tmp_path / "a.pt", given), tmp_path)
    assert torch.equal(load_file(made.base)["double_blocks.0.img_mlp.2.weight"], given[key])


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A file of 300 MB takes less than half of that beyond what a file of 1 MB takes."""
    def peak(width: int) -> int:
        sizes = replace(SMALL, layout=Layout(width, 8, 38), hidden=4 * width, head=64, patch=64)
        torch.manual_seed(0)
        found = {key: torch.ones(shape, dtype=torch.bfloat16) for key, shape in released.shapes(sizes).items()}
        path = released.save(tmp_path / f"w{width}.pt", found)
        size = path.stat().st_size
        code = ("import resource, sys; from pathlib import Path; from dydit_core.checkpoints.convert import convert; "
                "convert(Path(sys.argv[1]), Path(sys.argv[2])); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)")
        done = subprocess.run([sys.executable, "-c", code, str(path), str(tmp_path / "out")], capture_output=True, text=True,
                              check=True, cwd=Path(__file__).parents[1])
        path.unlink()
        shutil.rmtree(tmp_path / "out")
        assert width < 300 or size > 300e6
        return int(done.stdout)

    pytest.importorskip("resource")
    assert peak(384) - peak(16) < 150e6


# --- files that are refused

def test_a_missing_tensor(tmp_path: Path) -> None:
    for key in ("transformer_blocks.1.attn.to_k.weight", "norm_out.linear.bias", ROUTER_OF_THE_FIRST_SINGLE_BLOCK):
        found = released.tensors()
        del found[key]
        assert f"lacks the tensor {key}" in refused(tmp_path, found)


def test_an_extra_tensor(tmp_path: Path) -> None:
    assert "controlnet_x_embedder.bias that no DyDiT" in refused(tmp_path, changed(controlnet_x_embedder__bias=torch.zeros(1)))


def test_a_wrong_shape(tmp_path: Path) -> None:
    text = refused(tmp_path, changed(proj_out__weight=torch.zeros(8, 17, dtype=torch.bfloat16)))
    assert "proj_out.weight of size [8, 17] where its other tensors say [8, 16]" in text


@pytest.mark.parametrize("dtype, words", [(torch.int8, "in torch.int8"), (torch.float64, "in torch.float64"), (torch.float32, "of one type")])
def test_a_wrong_type(tmp_path: Path, dtype: torch.dtype, words: str) -> None:
    text = refused(tmp_path, changed(proj_out__bias=torch.zeros(8, dtype=dtype)))
    assert "proj_out.bias in" in text and words in text


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["transformer_blocks.0.attn.to_v.bias", "single_transformer_blocks.2.token_selection.linear_t.weight"])
def test_numbers_that_are_not_finite(tmp_path: Path, key: str, value: float) -> None:
    found = released.tensors()
    found[key].view(-1)[-1] = value
    assert f"{key} that are not finite" in refused(tmp_path, found)


def test_a_flux_without_routers(tmp_path: Path) -> None:
    found = {key: value for key, value in released.tensors().items() if ".token_selection." not in key}
    assert "without token routers; load it with Load Diffusion Model" in refused(tmp_path, found)


def test_a_file_that_is_converted_already(tmp_path: Path) -> None:
    made = convert(released.save(tmp_path / "a.pt", released.tensors()), tmp_path / "a")
    assert "is in ComfyUI's layout already" in sentence(made.base, tmp_path / "out")


@pytest.mark.parametrize("found", [{"unet.weight": torch.zeros(2)}, released.tensors() | {"x_embedder.weight": torch.zeros(2)}])
def test_another_model(tmp_path: Path, found: dict) -> None:
    assert "is neither a FLUX in diffusers' layout (it lacks a tensor x_embedder.weight of a fitting size) nor a DiT" in refused(tmp_path, found)


@pytest.mark.parametrize("content", [{"module": [1, 2]}, [torch.zeros(1)], {}, {"module": {"a": "b"}}, {"module": {3: torch.zeros(1)}}])
def test_a_pickle_of_something_else(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "bad.pt")
    assert "expected" in (text := sentence(tmp_path / "bad.pt", tmp_path / "out")) or "not a plain tensor" in text


class Malicious:
    def __reduce__(self) -> tuple:
        return (eval, ("__import__('pathlib').Path('/tmp/dydit-was-here').touch()",))


@pytest.mark.parametrize("payload, name", [(Malicious(), "eval"), (Path("/tmp"), "Path")])
def test_a_pickle_that_calls_for_code(tmp_path: Path, payload: object, name: str) -> None:
    torch.save({"module": released.tensors(), "args": payload}, tmp_path / "bad.pt")
    assert name in sentence(tmp_path / "bad.pt", tmp_path / "out")
    assert not Path("/tmp/dydit-was-here").exists()


def test_an_old_pickle(tmp_path: Path) -> None:
    torch.save({"module": released.tensors()}, tmp_path / "bad.pt", _use_new_zipfile_serialization=False)
    assert "of before 2020" in sentence(tmp_path / "bad.pt", tmp_path / "out")


@pytest.mark.parametrize("part", [0.0, 0.3, 0.999])
def test_a_truncated_pickle(tmp_path: Path, part: float) -> None:
    whole = released.save(tmp_path / "bad.pt", released.tensors()).read_bytes()
    (tmp_path / "bad.pt").write_bytes(whole[: int(part * len(whole))])
    sentence(tmp_path / "bad.pt", tmp_path / "out")


def test_a_large_index(tmp_path: Path) -> None:
    torch.save({"module": OrderedDict(words="x" * (65 * 2**20))}, tmp_path / "bad.pt")
    assert "more than 64 MB" in sentence(tmp_path / "bad.pt", tmp_path / "out")


def test_a_large_safetensors_header(tmp_path: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(struct.pack("<Q", 2**40) + b"{" + b" " * 100)
    assert "is damaged" in sentence(tmp_path / "bad.safetensors", tmp_path / "out")


def test_a_missing_file(tmp_path: Path) -> None:
    assert "is not a file" in sentence(tmp_path / "gone.pt", tmp_path / "out")


def test_too_little_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "has 0.0 GB free; make room" in refused(tmp_path, released.tensors())


def test_a_disk_that_fills_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(path: Path, mode: str) -> io.RawIOBase:
        path.touch()
        return Full()

    class Full(io.BytesIO):
        def write(self, data: bytes) -> int:
            if self.tell() > 10_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(stream, "open", small, raising=False)
    assert "No space left on device" in refused(tmp_path, released.tensors())


def test_the_header_is_what_safetensors_writes(tmp_path: Path) -> None:
    made = convert(released.save(tmp_path / "a.pt", released.tensors()), tmp_path)
    raw = made.base.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8:8 + size])
    assert size % 8 == 0 and max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__") == len(raw) - 8 - size


def test_a_failed_conversion_leaves_an_earlier_pair_whole(tmp_path: Path) -> None:
    tensors = released.tensors()
    made = convert(released.save(tmp_path / "a.pt", tensors), tmp_path)
    before = made.base.read_bytes(), made.routers.read_bytes()
    next(value for key, value in tensors.items() if key.startswith("proj_out"))[0] = float("nan")
    with pytest.raises(FileError, match="not finite"):
        convert(released.save(tmp_path / "a.pt", tensors), tmp_path)
    assert (made.base.read_bytes(), made.routers.read_bytes()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "a_base.safetensors", "a_routers.safetensors"]


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = released.save(tmp_path / "a.pt", released.tensors())

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refused)
    with pytest.raises(FileError, match="a.pt may not be read by this user; give yourself permission to read it"):
        convert(path, tmp_path)


def test_stopped_by_hand_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = released.save(tmp_path / "a.pt", released.tensors())

    def stop(self: object, done: int, total: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(converting.Bar, "__call__", stop)
    with pytest.raises(SystemExit, match="Stopped; nothing was written"):
        converting.run(argparse.Namespace(file=path, out=tmp_path, prediction=None, heads=None))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.pt"]
