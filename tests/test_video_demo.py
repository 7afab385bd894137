"""The small Latte of drawn videos: what is drawn, which way it moves, data, training, file, the command that makes it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dydit_core.checkpoints.adapter import load_adapter
from dydit_core.checkpoints.dit import find_dit
from dydit_core.checkpoints.source import open_source
from dydit_core.ddpm import chain
from dydit_core.demo import class_data, latte, make_latte, moving
from dydit_core.demo.autoencoder import Autoencoder
from dydit_core.demo.class_data import VIDEOS, load_class_data
from dydit_core.demo.class_model import export, load_class_model
from dydit_core.demo.files import CLASS_VAE_FILE, LATTE_ADAPTER_FILE, LATTE_FILE
from dydit_core.demo.motion import REST, STEPS, directions, moves_as_said
from dydit_core.demo.moving import CLASSES, FRAMES, NAMES, film, moving_scene
from dydit_core.demo.phase import averaged, train_phase
from dydit_core.demo.scenes import TOKEN
from dydit_core.demo.vae import export_learned_vae, load_decoder, load_learned_encoder
from dydit_core.models.latte import Latte, LatteConfig
from dydit_core.train.base import Run, Stage, load, new_run, train
from dydit_core.train.diffusion import Denoising, bound, draw_batch, error

CONFIG = LatteConfig(hidden_size=32, depth=2, num_heads=4, side=4, frames=3, classes=3)
PLAN = (Stage("full", 1, 8, None, 1e-2, 1e-2), Stage("settle", 1, 8, None, 1e-2, 1e-3))


def quiet(line: str) -> None:
    pass


# --- what is drawn

def test_classes_take_turns_and_vary_in_what_they_leave_open() -> None:
    scenes = [moving_scene(index) for index in range(len(NAMES) * 40)]
    for label, name in enumerate(NAMES):
        motion, some = CLASSES[name], [scene for scene, at in scenes if at == label]
        assert len(some) == 40 and all(scene.motion == motion for scene in some)
        assert {scene.backdrop.time for scene in some} == set(motion.times) and {scene.backdrop.ground for scene in some} == set(motion.grounds)
        assert len({scene.middle for scene in some}) == 2 * motion.aside + 1 and {scene.lead for scene in some} == {3, 4}
    assert len({scene.color for scene, _ in scenes}) == 8


def test_a_video_is_always_drawn_the_same() -> None:
    scenes = [moving_scene(index)[0] for index in (2, 9)]
    frames = film(scenes)
    assert frames.shape == (2, FRAMES, 3, 128, 128) and 0 <= frames.min() < frames.max() <= 1
    assert torch.equal(film(scenes[1:]), frames[1:]) and moving_scene(9) == (scenes[1], 9)


@pytest.mark.parametrize("label", range(len(NAMES)), ids=NAMES)
def test_something_moves_by_a_token_and_all_else_rests(label: int) -> None:
    """Every pixel is that of a scene in which nothing moves, or that of the frame before a token away; but for what comes in at
    the edges of the picture, or from behind the ground, and for soft edges in front of another shade of the sky."""
    scene, _ = moving_scene(label)
    frames, (right, down) = film([scene])[0], scene.motion.step
    resting = film([replace(scene, middle=(10_000, 10_000), motion=replace(scene.motion, what="sun"))])[0, 0]
    there = torch.roll(frames[:-1], (TOKEN * down, TOKEN * right), dims=(-2, -1))
    moved, rests = ((frames[1:] - other).abs().amax(1) < 0.05 for other in (there, resting))
    inner = (..., slice(TOKEN, -TOKEN), slice(TOKEN, -TOKEN))
    assert (moved | rests)[inner].float().mean() > 0.98
    assert 0.005 < (~rests).float().mean() < 0.5


# --- which way it moves

@pytest.mark.parametrize("step", STEPS, ids=str)
def test_a_moving_texture_is_seen_to_move(step: tuple[int, int]) -> None:
    texture = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    right, down = step
    video = torch.stack([torch.roll(texture, (TOKEN * down * frame, TOKEN * right * frame), (-2, -1)) for frame in range(4)], dim=1)
    assert directions(video) == [step]


def test_what_hardly_changes_rests() -> None:
    video = torch.full((1, 4, 3, 64, 64), 0.5)
    video[:, 2, :, 5, 5:9] = 1.0
    assert directions(video) == [REST]


def test_drawn_videos_move_as_their_class_says_and_not_as_another() -> None:
    scenes, labels = zip(*(moving_scene(class_data.FRESH + index) for index in range(60)))
    frames, labels = film(list(scenes)), torch.tensor(labels)
    assert moves_as_said(frames, labels).float().mean() >= 0.95
    shares = np.unique([motion.step for motion in CLASSES.values()], axis=0, return_counts=True)[1] / len(CLASSES)
    shuffled = labels[torch.randperm(60, generator=torch.Generator().manual_seed(0))]
    assert moves_as_said(frames, shuffled).float().mean().item() == pytest.approx(float((shares**2).sum()), abs=0.15)


# --- data

@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / CLASS_VAE_FILE
    export_learned_vae(*Autoencoder().parts(), path)
    return path


def test_videos_are_encoded_frame_by_frame_and_once(vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_data, "CHUNK", 2)
    monkeypatch.setattr(class_data, "AT_ONCE", 1)
    data = load_class_data(tmp_path, vae, 4, quiet, VIDEOS)
    assert data.latents.shape == (4, 4, FRAMES, 16, 16) and data.labels.tolist() == [0, 1, 2, 3]
    frame = film([moving_scene(3)[0]])[0, 5]
    encoded = load_learned_encoder(vae)(frame[None])[0]
    assert (data.latents[3, :, 5].float() - encoded).abs().max() < 0.05 * encoded.abs().max()
    decoded = latte.decode_videos(data.latents[3:].float(), load_decoder(vae))
    assert decoded.shape == (1, FRAMES, 3, 128, 128)
    monkeypatch.setattr(class_data, "encode", None)
    assert torch.equal(load_class_data(tmp_path, vae, 4, quiet, VIDEOS).latents, data.latents)


# --- training

class Toy:
    """Six fixed videos of three classes."""

    def __init__(self) -> None:
        self.latents = torch.randn(6, *CONFIG.latent_size, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return 6

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        return self.latents[index], index % 3


def fresh() -> Run:
    """Random weights everywhere: in one that was only just begun blocks do nothing, and what is in them learns nothing yet."""
    torch.manual_seed(0)
    model = Latte(CONFIG)
    with torch.no_grad():
        for param in model.parameters():
            if param.requires_grad:
                param.copy_(torch.randn_like(param) * (param.shape[-1] ** -0.5 if param.ndim > 1 else 0.3))
    return new_run(model)


def test_a_whole_video_is_mixed_with_noise_of_one_level() -> None:
    batch, data = draw_batch(fresh().model, Toy(), PLAN[0], torch.Generator().manual_seed(1)), Toy().latents
    assert batch.x.shape == (8, *CONFIG.latent_size) and batch.positions is None
    kept = chain(1000).kept[batch.step].float()[:, None, None, None, None]
    videos = (batch.x - (1 - kept).sqrt() * batch.target) / kept.sqrt()
    some = kept.flatten() > 0.01  # of the others the noise leaves no digits over
    off = (videos[:, None] - data).abs().flatten(2).amax(2).amin(1)
    assert some.sum() > 2 and off[some].max() < 1e-3


def test_the_bound_of_a_video_is_the_mean_over_its_frames() -> None:
    off, variance = torch.randn(2, 3, 4, 5, 2, 2, generator=torch.Generator().manual_seed(0))
    step = torch.tensor([0, 400, 999])
    frames = torch.stack([bound(off[:, :, frame], variance[:, :, frame], step) for frame in range(5)])
    assert torch.allclose(bound(off, variance, step), frames.mean(0), rtol=1e-5)


def test_rows_of_a_batch_of_videos_add_up() -> None:
    run, data = fresh(), Toy()
    loss = Denoising(data)(run, PLAN[0], torch.Generator().manual_seed(0))
    batch = draw_batch(run.model, data, PLAN[0], torch.Generator().manual_seed(0))
    whole = error(batch.predict(run.model, slice(0, 8)), batch, slice(0, 8)).mean()
    assert sum(loss(slice(start, start + 4)).item() for start in (0, 4)) == pytest.approx(whole.item(), rel=1e-5)


def test_two_steps_with_a_stop_between_are_two_steps(tmp_path: Path) -> None:
    whole, resumed = fresh(), fresh()
    train(whole, Denoising(Toy()), PLAN, tmp_path / "whole.pt", quiet)
    train(fresh(), Denoising(Toy()), PLAN[:1], tmp_path / "part.pt", quiet)
    load(resumed, tmp_path / "part.pt")
    assert resumed.step == 1
    train(resumed, Denoising(Toy()), PLAN, tmp_path / "part.pt", quiet)
    assert resumed.losses == whole.losses and len(whole.losses) == 2
    start, end = fresh().model.state_dict(), resumed.model.state_dict()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, end[name]) and torch.equal(value, start[name]) == name.endswith("_embed"), name
    assert all(torch.equal(value, resumed.ema[name]) for name, value in whole.ema.items())


# --- file and command

@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[LatteConfig]:
    """Narrow, of as many frames and classes as the true one."""
    config = replace(latte.LATTE, hidden_size=32, depth=2, num_heads=4)
    for module in (latte, make_latte):
        monkeypatch.setattr(module, "LATTE", config)
    yield config


def test_the_true_one_is_small_enough_to_ship() -> None:
    with torch.device("meta"):
        model = Latte(latte.LATTE)
    assert 10e6 < 2 * sum(value.numel() for value in model.state_dict().values()) < 13e6
    assert latte.LATTE.latent_size == (4, FRAMES, 16, 16) and latte.LATTE.tokens == FRAMES * (moving.SIDE // TOKEN) ** 2


def test_what_was_trained_comes_back_from_its_file(small: LatteConfig, tmp_path: Path) -> None:
    data = class_data.ClassData(torch.randn(4, *small.latent_size).half(), torch.arange(4))
    phase = latte.dense(data, 1, 0)
    train_phase(tmp_path, latte.fresh(0), phase, 0, 1, quiet)
    export(tmp_path / phase.checkpoint, small, NAMES, tmp_path / "latte.safetensors", "A title")
    found, drawn = find_dit(open_source(tmp_path / "latte.safetensors")), load_class_model(tmp_path / "latte.safetensors")
    assert found.config == small == drawn.model.config and found.class_names == NAMES and drawn.routers is None
    weights = averaged(tmp_path / phase.checkpoint)
    assert all(torch.equal(value, weights[name].half().float()) for name, value in drawn.model.state_dict().items())
    latents, spent = drawn.draw(torch.tensor([0, 5]), steps=2, cfg=2.0)
    alone = drawn.draw(torch.tensor([0]), steps=2, cfg=2.0)[0][0]
    assert latents.shape == (2, *small.latent_size) and spent == 1.0
    assert (latents[0] - alone).abs().max() < 1e-3 * alone.abs().max()


def test_one_command_makes_data_model_adapter_and_sheets(small: LatteConfig, vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                         capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(class_data, "CHUNK", 4)
    monkeypatch.setattr(make_latte, "SCENES", 8)
    monkeypatch.setattr(make_latte, "COUNTS", [3])
    weights, work = vae.parents[1], tmp_path / "work"
    make_latte.main(["--work", str(work), "--weights", str(weights), "--full", "1", "--settle", "1", "--adapter", "2", "--runs", "2", "--each", "1",
                     "--steps", "2", "--cfg", "1", "--processes", "1"])
    said = capsys.readouterr().out
    assert "drawn: 100.0 % move as said" in said and "dense_cfg1: " in said and "adapter_0.5: " in said and "spent 0." in said
    assert {"drawn.png", "drawn_vae.png", "dense_cfg1.png", "adapter_0.5.png"} <= {path.name for path in work.iterdir()}
    adapter = load_adapter(weights / LATTE_ADAPTER_FILE)
    assert adapter.facts.kind == "FlowLatte/2" and adapter.facts.substitutes == ("reuse",) and adapter.low_rank is None
    assert load_class_model(weights / LATTE_FILE).model.config == small


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="is not there; make it: python -m dydit_core.demo.make_dit vae"):
        make_latte.main(["latte", "--weights", str(tmp_path), "--work", str(tmp_path)])
    with pytest.raises(SystemExit):
        make_latte.main(["late"])
