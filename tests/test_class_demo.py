"""The class-conditional demo models: their classes, their VAE, the files they become."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from dydit_core.checkpoints.dit import find_dit
from dydit_core.checkpoints.source import open_source
from dydit_core.demo import autoencoder, dit, make_dit
from dydit_core.demo.autoencoder import CHANNELS, Autoencoder, project, train_autoencoder
from dydit_core.demo.checker import load_checker
from dydit_core.demo.class_data import FRESH, ClassData, load_class_data
from dydit_core.demo.class_model import ClassModel, export, load_class_model
from dydit_core.demo.classes import CLASSES, NAMES, class_scene, recognized
from dydit_core.demo.codec import fit_codec
from dydit_core.demo.data import draw
from dydit_core.demo.dit import fresh, routed, twin
from dydit_core.demo.files import CHECKER_FILE, WEIGHTS, class_file
from dydit_core.demo.phase import Phase, averaged, train_phase
from dydit_core.demo.vae import SD_SCALE, SQUASH, decode, export_learned_vae, load_decoder, load_learned_encoder
from dydit_core.models.dit import EPS, FLOW, DiTConfig, timestep
from dydit_core.routers.dit import DiTRouters
from dydit_core.runtime import Method
from dydit_core.sampling import eps_sigmas
from dydit_core.substitutes.nothing import Nothing
from dydit_core.train.base import Stage, new_run, save
from dydit_core.train.calibrate_dit import measure
from dydit_core.train.diffusion import Denoising
from dydit_core.train.dynamic import Decisions, DynamicDenoising
from safetensors.torch import load_file
from test_demo_vae import run_taesd_encoder


def quiet(line: str) -> None:
    pass


# --- classes

def test_a_class_shows_what_it_says_and_varies_in_the_rest() -> None:
    scenes = [class_scene(index) for index in range(14 * 40)]
    for label, name in enumerate(NAMES):
        motif, some = CLASSES[name], [scene for scene, at in scenes if at == label]
        assert len(some) == 40 and all([thing.kind for thing in scene.things] == [motif.kind] * motif.count for scene in some)
        assert all(set(motif.extras) <= set(scene.extras) for scene in some)
        assert {scene.time for scene in some} == set(motif.times) and {scene.ground for scene in some} == set(motif.grounds)
    colors = {thing.color for scene, _ in scenes for thing in scene.things}
    assert len(colors) == 8 and class_scene(77) == class_scene(77)


@pytest.mark.skipif(not (WEIGHTS / CHECKER_FILE).exists(), reason="the demo's checker is not in this checkout")
def test_the_checker_recognises_drawn_classes_and_no_others() -> None:
    scenes, labels = zip(*(class_scene(FRESH + index) for index in range(56)))
    images, labels, checker = draw(list(scenes)), torch.tensor(labels), load_checker(WEIGHTS / CHECKER_FILE)
    assert recognized(images, labels, checker).float().mean() > 0.9
    assert recognized(images, (labels + 1) % len(NAMES), checker).float().mean() < 0.05


# --- VAE

@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that starts as the best projection, with a random decoder."""
    torch.manual_seed(0)
    model, path = Autoencoder(), tmp_path_factory.mktemp("vae") / "vae.safetensors"
    images = draw([class_scene(index)[0] for index in range(8)])
    project(model.encoder, fit_codec(images, CHANNELS))
    with torch.no_grad():
        model.spread.momentum = 1.0
        model(images, torch.zeros(8, CHANNELS, 32, 32))
    export_learned_vae(*model.parts(), path)
    return path


def test_an_encoder_starts_as_the_best_projection() -> None:
    images = draw([class_scene(index)[0] for index in range(4)])
    codec = fit_codec(images, CHANNELS)
    encoder = autoencoder.Encoder(CHANNELS)
    project(encoder, codec)
    off = encoder(images) - codec.to_latent(images)
    assert (off - off.mean((0, 2, 3), keepdim=True)).abs().max() < 1e-4


def test_latents_of_the_file_have_spread_one(vae: Path) -> None:
    latents = load_learned_encoder(vae)(draw([class_scene(index)[0] for index in range(8)]))
    assert latents.mean((0, 2, 3)).abs().max() < 0.02 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.02


def test_the_file_is_a_taesd_of_four_channels(vae: Path) -> None:
    """Encoder and decoder spelled out from the file, with what ComfyUI does around them, are those that trained."""
    tensors = {key: value.float() for key, value in load_file(vae).items()}
    assert tensors["taesd_decoder.1.weight"].shape == (64, 4, 3, 3) and tensors["taesd_encoder.14.weight"].shape == (4, 64, 3, 3)
    assert vae.stat().st_size < 5e6 and tensors["vae_scale"].item() == pytest.approx(SD_SCALE * SQUASH)
    images = draw([class_scene(index)[0] for index in range(2)])
    hosts = run_taesd_encoder(tensors, images) / tensors["vae_scale"] + tensors["vae_shift"]
    assert torch.allclose(hosts * SD_SCALE, load_learned_encoder(vae)(images), atol=2e-3)
    assert decode(torch.zeros(1, 4, 32, 32), load_decoder(vae)).shape == (1, 3, 256, 256)


def test_an_autoencoder_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autoencoder, "PICTURES", 4)
    monkeypatch.setattr(autoencoder, "BATCH", 2)
    monkeypatch.setattr(autoencoder, "crops", lambda images, generator: images[:2, :, 96:192, 96:192])
    monkeypatch.setattr(autoencoder, "SAVE_EVERY", 1)
    whole = train_autoencoder(tmp_path / "whole", 3, log=quiet)

    def stop(line: str) -> None:
        if "step 2" in line:  # told before it is saved: the first step is what is kept
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_autoencoder(tmp_path / "part", 3, log=stop)
    part = train_autoencoder(tmp_path / "part", 3, log=quiet)
    for one, other in zip(whole, part):
        assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


# --- pictures, networks, files

@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dit, "CONFIGS", {name: DiTConfig(hidden_size=32, depth=2, num_heads=4, classes=len(NAMES), prediction=prediction,
                                                         learned_variance=prediction == EPS)
                                         for name, prediction in (("dit", EPS), ("sit", FLOW))})


@pytest.fixture
def data() -> ClassData:
    generator = torch.Generator().manual_seed(0)
    return ClassData(torch.randn(16, 4, 32, 32, generator=generator).half(), torch.arange(16) % len(NAMES))


def test_pictures_are_encoded_once_for_each_vae(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dydit_core.demo.class_data.CHUNK", 4)
    first = load_class_data(tmp_path, vae, 8, quiet)
    assert first.latents.shape == (8, 4, 32, 32) and first.labels.tolist() == list(range(8))
    encoded = load_learned_encoder(vae)(draw([class_scene(5)[0]]))
    assert (first.latents[5].float() - encoded[0]).abs().max() < 0.1
    monkeypatch.setattr("dydit_core.demo.class_data.encode", None)
    assert torch.equal(load_class_data(tmp_path, vae, 8, quiet).latents, first.latents)


def test_the_second_phase_begins_where_the_first_ended(small: None, data: ClassData, tmp_path: Path) -> None:
    """Dense, then with routers, then a SiT from the DiT; the files are in the authors' March 2025 layout."""
    first = Phase("dit_dense.pt", (Stage("full", 1, 2, 16, 1e-3, 1e-3),), Denoising(data))
    train_phase(tmp_path, fresh("dit", 0), first, 0, 1, quiet)
    dense = averaged(tmp_path / "dit_dense.pt")
    second = Phase("dit_dynamic.pt", (Stage("dynamic", 1, 8, 16, 1e-3, 1e-3),), DynamicDenoising(data, 1))
    model = routed("dit", tmp_path / "dit_dense.pt")
    x, time, labels = torch.randn(1, 4, 32, 32), torch.tensor([500.0]), torch.tensor([3])
    start = fresh("dit", 1)
    start.load_state_dict(dense)
    assert torch.allclose(model(x, time, labels), start(x, time, labels), atol=1e-5)
    train_phase(tmp_path, model, second, 0, 1, quiet)
    export(tmp_path / "dit_dynamic.pt", dit.CONFIGS["dit"], NAMES, tmp_path / "dit.safetensors", "A title")
    found = find_dit(open_source(tmp_path / "dit.safetensors"))
    assert found.config == dit.CONFIGS["dit"] and found.routers.always_on and found.class_names == NAMES and found.title.startswith("DyDiT")
    sit = twin(tmp_path / "dit_dense.pt", 0)
    assert torch.equal(sit.blocks[1].mlp.fc1.weight, dense["blocks.1.mlp.fc1.weight"])
    train_phase(tmp_path, sit, Phase("sit_dense.pt", first.stages, Denoising(data)), 0, 1, quiet)
    export(tmp_path / "sit_dense.pt", dit.CONFIGS["sit"], NAMES, tmp_path / "sit.safetensors", "A title")
    drawn = load_class_model(tmp_path / "sit.safetensors")
    assert drawn.routers is None and drawn.model.config == dit.CONFIGS["sit"]
    assert drawn.draw(torch.tensor([0, 5]), steps=2, cfg=2.0)[0].shape == (2, 4, 32, 32)


def test_the_twin_knows_noise_levels_by_what_the_dit_called_them(small: None, tmp_path: Path) -> None:
    dense = fresh("dit", 0)
    with torch.no_grad():
        dense.t_embedder.mlp[0].weight.mul_(20.0)
        for fast in (slice(0, 90), slice(128, 218)):  # as in a trained one, neighbouring timesteps are called alike
            dense.t_embedder.mlp[0].weight[:, fast] = 0.0
    save(new_run(dense), tmp_path / "dit_dense.pt")
    sit, sigma = twin(tmp_path / "dit_dense.pt", 0), torch.tensor([0.1, 0.5, 2.0, 20.0])
    with torch.no_grad():
        said = dense.embed_time(timestep(sigma, EPS), torch.float32)
        says = sit.embed_time(timestep(sigma / (1 + sigma), FLOW), torch.float32)
    assert (says - said).square().sum() < 0.1 * (said - said.mean(0)).square().sum()


def test_a_finished_phase_is_not_trained_again(small: None, data: ClassData, tmp_path: Path) -> None:
    phase = Phase("dit_dense.pt", (Stage("full", 1, 2, 16, 1e-3, 1e-3),), Denoising(data))
    train_phase(tmp_path, fresh("dit", 0), phase, 0, 1, quiet)
    before = (tmp_path / "dit_dense.pt").stat().st_mtime_ns
    train_phase(tmp_path, fresh("dit", 0), phase, 0, 1, quiet)
    assert (tmp_path / "dit_dense.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_the_file_that_ships_is_calibrated(small: None, data: ClassData, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also by a stage that is done and left one that is not."""
    monkeypatch.setattr(make_dit, "CONFIGS", dit.CONFIGS)
    monkeypatch.setattr(make_dit, "_data", lambda args: data)
    monkeypatch.setattr(make_dit, "log", quiet)
    monkeypatch.setattr(make_dit, "measure", lambda found, seed: measure(found, 2, 2, seed))
    save(new_run(fresh(name, 0)), tmp_path / f"{name}_dense.pt")
    args = argparse.Namespace(work=tmp_path, weights=tmp_path / "weights", seed=0, processes=1, dynamic=1)
    make_dit.make_dynamic(name, args)
    target = args.weights / class_file(name)
    made = {key: value.clone() for key, value in load_file(target).items()}
    assert load_class_model(target).routers.table.quantiles.shape == (2, 10, 33) and find_dit(open_source(target)).class_names == NAMES
    target.write_bytes((tmp_path / f"{name}_dynamic.safetensors").read_bytes())
    assert load_class_model(target).routers.table is None
    make_dit.make_dynamic(name, args)
    again = load_file(target)
    assert again.keys() == made.keys() and all(torch.equal(value, made[key]) for key, value in again.items())


@pytest.mark.parametrize("name", ["dit", "sit"])
def test_what_was_trained_with_masks_runs_without_what_they_shut(small: None, name: str, tmp_path: Path) -> None:
    """The file's own decisions in the sparse runtime draw the pictures that the gates of training draw."""
    torch.manual_seed(0)
    dense = fresh(name, 0)
    with torch.no_grad():
        for param in dense.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    model = dit.with_routers(dense)
    with torch.no_grad():
        for block in model.blocks:
            for layer in (block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]):
                layer.weight.mul_(3.0)
                layer.bias.copy_(0.3 * torch.randn_like(layer.bias))
            block.token_selection.mlp_head[2].bias.fill_(0.0)
    save(new_run(model), tmp_path / "run.pt")
    export(tmp_path / "run.pt", dit.CONFIGS[name], NAMES, tmp_path / "file.safetensors", "A title")
    drawn, labels = load_class_model(tmp_path / "file.safetensors"), torch.tensor([0, 3])
    assert isinstance(drawn.routers, DiTRouters)
    half = {key: value.half().float() for key, value in model.state_dict().items()}
    model.load_state_dict(half)
    found, spent = drawn.draw(labels, steps=3, method=Method(drawn.routers.by_threshold(), Nothing()))
    schedule, shares = drawn.schedule(3), []
    x = schedule[0] * torch.stack([torch.randn(4, 32, 32, generator=torch.Generator().manual_seed(row)) for row in range(2)])
    with torch.no_grad():
        for now, following in zip(schedule, schedule[1:]):
            sigma = torch.full((2,), now)
            decisions = Decisions(model.embed_time(timestep(sigma, model.config.prediction), x.dtype))
            x = x + (following - now) * model.denoise_direction(x, sigma, labels, {"decisions": decisions})
            shares.append(decisions.cost(model.blocks[0], 256).mean().item())
    assert torch.allclose(found, x, atol=1e-3 * float(x.abs().max()))
    # What the runtime spends counts the routers and the adaLN too, which the training's cost does not.
    assert spent == pytest.approx(sum(shares) / len(shares), abs=0.06) and spent < 0.9


def test_a_dit_starts_from_all_of_its_noise(small: None, tmp_path: Path) -> None:
    assert ClassModel(fresh("dit", 0), None).schedule(20) == eps_sigmas(20)
