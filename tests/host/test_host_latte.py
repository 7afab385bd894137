"""Latte as a MODEL of the host: the videos of plain torch, and what a graph does with video latents."""

from __future__ import annotations

import pytest
import torch
from tiny_dit import dit, load_dit, transformer  # first: starts the host
from tiny_dit import config as dit_config
from tiny_latte import CLASSES, FRAMES, SIDE, config, euler, latte, network, sample

import comfy.model_management
import comfy.samplers
import comfy_extras.nodes_post_processing  # noqa: F401 - before nodes_latent, which it and that import
import latent_preview
from arrangements import nothing_fits
from comfy.cli_args import LatentPreviewMethod
from comfy_extras.nodes_latent import LatentCutToBatch
from dydit_pack.dydit_core.models.dit import FLOW
from dydit_pack.nodes.classes import conditioning
from dydit_pack.nodes.dit import FramesSD15, dit_model
from dydit_pack.nodes.video import DyDiTEmptyVideo
from nodes import VAEDecode, common_ksampler
from tiny import as_node, budgeted


def sigmas_of(steps: int, model: object = None) -> torch.Tensor:
    return comfy.samplers.calculate_sigmas((model or latte()).get_model_object("model_sampling"), "simple", steps)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5 * float(expected.abs().max()))


def empty(model: object, batch_size: int = 1) -> dict:
    return as_node(DyDiTEmptyVideo).EXECUTE_NORMALIZED(model=model, batch_size=batch_size).result[0]


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_a_class_through_the_hosts_sampler_is_the_video_of_plain_torch(cfg: float) -> None:
    expected = euler(config(), sigmas_of(6), 3, cfg, batch=2)
    close(sample(latte(), 6, cfg, batch=2), expected)
    assert expected.std() > 0.1 and (expected - euler(config(), sigmas_of(6), 4, cfg, batch=2)).abs().max() > 0.1 * expected.std()


def test_one_that_was_trained_by_flow_matching() -> None:
    model = latte(prediction=FLOW)
    expected = euler(config(prediction=FLOW), sigmas_of(6, model), 3, 4.0)
    close(sample(model, 6, 4.0), expected)
    assert sigmas_of(6, model)[0] == 1 and (expected - euler(config(), sigmas_of(6), 3, 4.0)).abs().max() > 0.1 * expected.std()


def test_an_unconditional_one_takes_any_conditioning() -> None:
    expected = euler(config(classes=0), sigmas_of(4), None)
    for positive in (conditioning(3), conditioning(7, "cock"), [[torch.zeros(1, 77, 768), {}]]):
        close(sample(latte(0), 4, positive=positive), expected)
    assert torch.equal(sample(latte(0), 4, 4.0, positive=[[torch.zeros(1, 77, 768), {}]]), sample(latte(0), 4, 4.0))


@pytest.mark.parametrize("sampler, scheduler", [("dpmpp_2m", "karras"), ("uni_pc", "simple"), ("dpmpp_2m_sde", "beta")])
def test_the_stock_samplers_and_schedules_run(sampler: str, scheduler: str) -> None:
    found, like = sample(latte(), 6, 2.0, sampler, scheduler=scheduler), sample(latte(), 6, 2.0)
    assert found.isfinite().all() and 0.3 < found.std() / like.std() < 3


def test_an_empty_video_is_of_the_models_own_size() -> None:
    latent = empty(latte(), 2)
    assert latent["samples"].shape == (2, 4, FRAMES, SIDE, SIDE) and not latent["samples"].any()
    found = common_ksampler(latte(), 5, 4, 1.0, "euler", "simple", conditioning(3), conditioning(None), empty(latte()))[0]["samples"]
    close(found, sample(latte(), 4))
    with pytest.raises(ValueError, match=r"^DyDiT Empty Video: this model is no Latte; use the empty latent node that belongs to it"):
        empty(dit())
    with pytest.raises(ValueError, match=r"^DyDiT Empty Video: batch_size is 0; it must be 1 or more\.$"):
        empty(latte(), 0)


@pytest.mark.parametrize("shape, words", [((1, 4, SIDE, SIDE), "draws videos, and the latent is of a picture"),
                                          ((1, 16, FRAMES, SIDE, SIDE), "draws in 4 channels, and the latent has 16"),
                                          ((1, 4, 7, SIDE, SIDE), "was made for 5 frames, and the latent has 7"),
                                          ((1, 4, FRAMES, SIDE, 16), "was made for frames of 96×96, and the latent is of 128×96")])
def test_other_latents_are_refused(shape: tuple[int, ...], words: str) -> None:
    """Also under a budget with a mask for each frame there is: the latent is what is wrong."""
    masks = torch.zeros(FRAMES, 8, 8)
    for model in (latte(), budgeted(latte(), 0.7, protect=masks)):
        with pytest.raises(ValueError, match=rf"^This Latte-64×4/2 {words}; use the latent of DyDiT Empty Video, 5 frames of 96×96(, and no prompt for an area|, no prompt for a part of the video, and no Context Windows)?\.$"):
            common_ksampler(model, 5, 1, 1.0, "euler", "simple", conditioning(3), conditioning(None), {"samples": torch.ones(shape)})


def test_a_dit_refuses_a_video() -> None:
    with pytest.raises(ValueError, match=r"^This DiT-64×3/2 draws pictures, and the latent is of a video; use an Empty Latent Image\.$"):
        common_ksampler(load_dit(dit_config()), 5, 1, 1.0, "euler", "simple", conditioning(3), conditioning(None), empty(latte()))


def test_a_dit_refuses_latents_of_other_channels() -> None:
    with pytest.raises(ValueError, match=r"^This DiT-64×3/2 draws in 4 channels, and the latent has 16; use an Empty Latent Image, or encode with a VAE of Stable Diffusion 1\.$"):
        common_ksampler(load_dit(dit_config()), 5, 1, 1.0, "euler", "simple", conditioning(3), conditioning(None), {"samples": torch.ones(1, 16, 12, 12)})


def test_conditioning_that_is_no_class_of_the_model() -> None:
    for positive, words in (([[torch.zeros(1, 77, 768), {}]], "draws classes and no prompts"), (conditioning(CLASSES), "has classes 0 to 9"),
                            (conditioning(7, "cock"), '"cock" is no class of this Latte-64×4/2, which has 10 classes')):
        with pytest.raises(ValueError, match=words):
            sample(latte(), 1, positive=positive)


def test_it_draws_in_its_own_size_alone() -> None:
    with pytest.raises(ValueError, match="This Latte-64×4/2 draws in the size it was made for alone; turn interpolate_positions off"):
        load_dit(config(), interpolate=True)


class TinyVAE:
    """What the host's VAE does with a video in a two-dimensional one: it takes the first frame of each."""

    def decode(self, latent: torch.Tensor) -> torch.Tensor:
        return latent[:, :, 0].movedim(1, -1)


def test_core_nodes_decode_every_frame() -> None:
    videos = sample(latte(), 2, batch=2)
    frames = LatentCutToBatch.execute({"samples": videos}, "t", 1).result[0]
    pictures, = VAEDecode().decode(TinyVAE(), frames)
    assert torch.equal(pictures, videos.permute(0, 2, 3, 4, 1).flatten(0, 1))


@pytest.mark.parametrize("method", [LatentPreviewMethod.Latent2RGB, LatentPreviewMethod.TAESD])
def test_previews_show_the_first_frame(monkeypatch: pytest.MonkeyPatch, method: LatentPreviewMethod) -> None:
    monkeypatch.setattr(latent_preview.args, "preview_method", method)
    model = latte()
    assert isinstance(model.model.latent_format, FramesSD15)
    _, picture, _ = latent_preview.get_previewer("cpu", model.model.latent_format).decode_latent_to_preview_image("JPEG", torch.randn(1, 4, FRAMES, SIDE, SIDE))
    assert picture.size == (SIDE, SIDE)


def test_weights_that_do_not_fit_and_weights_in_fp8(monkeypatch: pytest.MonkeyPatch) -> None:
    with nothing_fits():
        model = load_dit(config())
        found = sample(model, 4, 2.0)
        assert transformer(model).blocks[1].mlp.fc1.comfy_cast_weights
    close(found, sample(latte(), 4, 2.0))
    monkeypatch.setattr(comfy.model_management.args, "fp8_e4m3fn_unet", True)
    model = load_dit(config())
    looked_up = ("pos_embed", "temp_embed", "y_embedder.embedding_table.weight")
    assert transformer(model).blocks[0].mlp.fc1.weight.dtype == torch.float8_e4m3fn
    assert all(transformer(model).get_parameter(name).dtype == torch.float32 for name in looked_up)
    rounded = {key: value if key in looked_up else value.to(torch.float8_e4m3fn).float() for key, value in network(config()).state_dict().items()}
    monkeypatch.undo()
    model.set_model_compute_dtype(torch.float32)
    close(sample(model, 4, 2.0), sample(dit_model(config(), rounded), 4, 2.0))
