"""DyDiT Class Label: what it makes of a choice, and a whole graph from a class to a picture by the host's own executor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from queueing import queue  # first: starts the host
from dit_files import load, models, write  # noqa: F401 - the fixture works by being here
from tiny import as_node, budgeted
from tiny_dit import config, sample

import comfy.sd
import folder_paths
import nodes as host_nodes
from comfy.taesd.taesd import Decoder, Encoder
from dydit_pack.dydit_core.demo.classes import NAMES as DEMO
from dydit_pack.dydit_core.demo.moving import NAMES as MOVING
from dydit_pack.dydit_core.imagenet import imagenet
from dydit_pack.nodes.budget import DyDiTBudget
from dydit_pack.nodes.checkpoint import DyDiTCheckpointLoader
from dydit_pack.nodes.classes import conditioning
from dydit_pack.nodes.label import DyDiTClassLabel, choices
from safetensors.torch import save_file


def label(class_name: str, number: int = -1) -> list:
    return as_node(DyDiTClassLabel).EXECUTE_NORMALIZED(class_name=class_name, number=number).result[0]


def test_the_names_of_imagenet() -> None:
    """Those that the class numbers of DiT's own samples have: 207, 360, 387, 974, 88, 979, 417, 279."""
    samples = ("golden retriever", "otter", "lesser panda", "geyser", "macaw", "valley", "balloon", "Arctic fox")
    assert len(imagenet()) == len(set(imagenet())) == 1000
    assert tuple(imagenet()[number] for number in (207, 360, 387, 974, 88, 979, 417, 279)) == samples


def same(found: list, expected: list) -> bool:
    (code, facts), (other, more) = found[0], expected[0]
    return torch.equal(code, other) and facts == more


def test_a_class_by_name_or_number() -> None:
    assert len(choices()) == 1 + len(DEMO) + len(MOVING) + 1000
    assert same(label("207 golden retriever"), conditioning(207, "golden retriever"))
    assert same(label(f"{DEMO[3]} (demo)"), conditioning(3, DEMO[3]))
    assert same(label(f"{MOVING[2]} (demo video)"), conditioning(2, MOVING[2]))
    assert same(label("none (for negative)"), conditioning(None))
    assert same(label("207 golden retriever", 3), conditioning(3))
    with pytest.raises(ValueError, match="number is -2; it must be from 0 to 99999, or -1 for class_name"):
        label("207 golden retriever", -2)
    with pytest.raises(ValueError, match='^DyDiT Class Label: class_name is "unicorn", which is no entry of the list; choose one, or give its number'):
        label("unicorn")


@pytest.fixture(scope="module")
def vae() -> str:
    """A VAE for four channels, with random weights, as TAESD's files are laid out."""
    torch.manual_seed(1)
    parts = {"taesd_encoder": Encoder(4), "taesd_decoder": Decoder(4)}
    tensors = {f"{name}.{key}": 0.05 * torch.randn(value.shape) for name, part in parts.items() for key, value in part.state_dict().items()}
    folder = Path(folder_paths.get_folder_paths("vae")[0])
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "four.safetensors")
    return "four.safetensors"


def graph(file: str, vae: str, budget: float, method: str, **more: object) -> dict:
    loader = {"checkpoint_name": file, "guidance_channels": "first three (as the original)", "interpolate_positions": False}
    spent = {"model": ["1", 0], "adapter": ["1", 1], "budget": budget, "method": method, "substitute": "auto", "start_percent": 0.0, "end_percent": 1.0,
             "min_keep": 0.1, "branch_share": 1.0}
    sampler = {"model": ["2", 0], "positive": ["3", 0], "negative": ["4", 0], "latent_image": ["5", 0], "seed": 7, "steps": 8, "cfg": 4.0,
               "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
    none = {"class_name": "none (for negative)", "number": -1}
    nodes = {"1": ("DyDiTCheckpointLoader", loader), "2": ("DyDiTBudget", spent), "3": ("DyDiTClassLabel", {**none, "number": 4, **more}),
             "4": ("DyDiTClassLabel", none), "5": ("EmptyLatentImage", {"width": 128, "height": 128, "batch_size": 2}), "6": ("KSampler", sampler),
             "7": ("VAELoader", {"vae_name": vae}), "8": ("VAEDecode", {"samples": ["6", 0], "vae": ["7", 0]}),
             "9": ("PreviewImage", {"images": ["8", 0]})}
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize("method, budget", [("auto", 1.0), ("auto", 0.6), ("checkpoint", 0.6), ("changed tokens", 0.8)])
def test_from_a_class_to_a_picture(models: Path, vae: str, method: str, budget: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loader, class, KSampler and VAE by the host's executor; the latent is that of the nodes called one by one."""
    path, seen = write(models, "graph.safetensors", config()), []
    _with_our_nodes(monkeypatch)
    decode = comfy.sd.VAE.decode
    monkeypatch.setattr(comfy.sd.VAE, "decode", lambda self, samples, *args, **kwargs: seen.append((samples, decode(self, samples, *args, **kwargs))) or seen[-1][1])
    queue(graph(path.name, vae, budget, method))
    (latent, picture), = seen
    assert latent.shape == (2, 4, 16, 16) and picture.shape == (2, 128, 128, 3) and picture.std() > 0.01
    model, adapter = load(path, guidance_channels="first three (as the original)")
    expected = sample(budgeted(model, budget, adapter=adapter, method=method), 8, 4.0, scheduler="normal", label=4, seed=7, batch=2)
    torch.testing.assert_close(latent, expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_a_number_that_the_model_has_not(models: Path, vae: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(models, "graph.safetensors", config())
    _with_our_nodes(monkeypatch)
    with pytest.raises(AssertionError, match="^DyDiT Class Label: number is 10, and this DiT-64×3/2 has classes 0 to 9"):
        queue(graph(path.name, vae, 0.6, "auto", number=10))
    with pytest.raises(AssertionError, match='^DyDiT Class Label: "golden retriever" is no class of this DiT-64×3/2, which has 10 classes'):
        queue(graph(path.name, vae, 0.6, "auto", class_name="207 golden retriever", number=-1))


def _with_our_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    for node in (DyDiTBudget, DyDiTCheckpointLoader, DyDiTClassLabel):
        monkeypatch.setitem(host_nodes.NODE_CLASS_MAPPINGS, node.__name__, node)
