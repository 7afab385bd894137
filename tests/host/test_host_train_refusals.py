"""Every way a DyDiT Train node is used wrongly, or is let down by the machine: one sentence, and what was saved stays whole."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import CONTEXT, POOLED, budgeted, flux, prompt, sample  # first: starts the host
from trainings import PROMPTS, folder, losses, quick_and_clean, said, train  # noqa: F401 - the fixture works by being here

import comfy.model_sampling
from dydit_pack.dydit_core.checkpoints.adapter import load_adapter
from dydit_pack.dydit_core.train import session, trajectories
from dydit_pack.nodes import training


def other_text() -> list:
    return [[torch.zeros(1, 12, CONTEXT + 1), {"pooled_output": torch.zeros(1, POOLED)}]]


def not_a_flow() -> Any:
    patched = flux().clone()
    patched.add_object_patch("model_sampling", comfy.model_sampling.EPS())
    return patched


def token_changer() -> Any:
    patched = flux().clone()
    patched.set_model_patch(lambda *args: args, "post_input")
    return patched


def replaced_block() -> Any:
    patched = flux().clone()
    patched.add_object_patch("diffusion_model.single_blocks.0.forward", lambda *args, **kwargs: None)
    return patched


def of_another_loader() -> Any:
    patched = flux().clone()
    patched.cached_patcher_init = None
    return patched


def latents(*sizes: tuple[int, ...]) -> list[dict]:
    return [{"samples": torch.zeros(size)} for size in sizes]


WRONG: list[tuple[Callable[[], dict], str]] = [
    (lambda: {"positive": []}, "positive holds no prompt; connect DyDiT Prompts"),
    (lambda: {"positive": [[[torch.zeros(1, 12, CONTEXT), {}]]]}, "positive is no prompt for FLUX .* encode it with the text encoders"),
    (lambda: {"positive": [other_text()]}, r"positive was encoded for another model \(129 and 64 numbers .* this model takes 128 and 64\)"),
    (lambda: {"positive": [prompt(1, reference_latents=[1])]}, r"positive carries more than a prompt \(reference_latents\)"),
    (lambda: {"positive": [prompt(1, guidance=3.0), prompt(2, guidance=4.0)]}, r"different guidance \(3 to 4\); use one Flux Guidance"),
    (lambda: {"latents": latents((2, 16, 8, 8))}, "positive holds 4 prompts and latents 2 pictures; connect one prompt for each picture"),
    (lambda: {"latents": latents((4, 4, 8, 8))}, r"latents are not of a FLUX VAE \(16 channels\)"),
    (lambda: {"latents": latents((2, 16, 8, 8), (2, 16, 8, 16))}, r"latents come in 2 sizes \(the first 64 × 64 pixels\)"),
    (lambda: {"cfg": 2.0}, "cfg is 2 and negative is empty; connect an empty prompt"),
    (lambda: {"cfg": 2.0, "negative": [prompt(1, 20)]}, "negative has 20 text tokens and the prompts 12"),
    (lambda: {"name": "../up"}, 'name is "../up"; write letters, digits'),
    (lambda: {"name": "a."}, 'name is "a."; write letters, digits'),
    (lambda: {"sampling_steps": "4, many"}, 'sampling_steps is "4, many"; write whole numbers from 2 to 200'),
    (lambda: {"sampling_steps": ""}, 'sampling_steps is ""; write whole numbers'),
    (lambda: {"batch": 10}, "batch is 10; it must be a multiple of 4"),
    (lambda: {"model": not_a_flow()}, "this model does not sample along a flow.*works on FLUX.1 models"),
    (lambda: {"model": token_changer()}, r"another node works inside this model's layers \(post_input\)"),
    (lambda: {"model": replaced_block()}, r"another node works inside this model's layers \(single_blocks.0\)"),
    (lambda: {"model": of_another_loader()}, "the loader of this model cannot make a copy of it; load the model with Load Diffusion Model"),
]


@pytest.mark.parametrize("inputs, sentence", WRONG, ids=[sentence[:40] for _, sentence in WRONG])
def test_a_mistake_is_one_sentence(inputs: Callable[[], dict], sentence: str) -> None:
    with pytest.raises(ValueError, match=f"^DyDiT Train: .*{sentence}" if not sentence.startswith("pos") else f"^DyDiT Train: {sentence}") as raised:
        train(**inputs())
    text = str(raised.value)
    assert text.endswith(".") and "\n" not in text and len(text) < 320
    assert said()["state"] == "failed" and said()["lines"] == [text], "the node says it too"


def test_a_base_that_is_no_flux() -> None:
    model = flux().clone()
    model.add_object_patch("diffusion_model", torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"^DyDiT Train: Linear has no FLUX blocks .* works on FLUX.1 models"):
        train(model=model)


def test_the_folder_of_another_training() -> None:
    train(steps=1)
    before = losses()
    with pytest.raises(ValueError, match=r"name t is that of another training \(it differs in: learning_rate, sampling_steps\); write another name"):
        train(steps=1, learning_rate=0.02, sampling_steps="2")
    assert losses() == before


def test_other_loras_and_another_shift_are_another_training() -> None:
    train(steps=1)
    changed = flux().clone()
    changed.add_patches({"diffusion_model.single_blocks.0.linear2.weight": ("diff", (torch.ones(256, 1280),))})
    with pytest.raises(ValueError, match=r"it differs in: model \(its weights or LoRAs\)"):
        train(steps=1, model=changed)
    shifted = flux().clone()
    sampling = type(flux().get_model_object("model_sampling"))(flux().model.model_config)
    sampling.set_parameters(shift=2.0)
    shifted.add_object_patch("model_sampling", sampling)
    with pytest.raises(ValueError, match=r"it differs in: model \(its shift\)"):
        train(steps=1, model=shifted)


def failing_after(count: int, error: Exception) -> Callable[..., Any]:
    """`train_step` until the step number `count`, which raises."""
    real = session.train_step

    def step(run: Any, *args: Any) -> float:
        if run.step == count:
            raise error
        return real(run, *args)

    return step


def test_a_loss_that_is_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    train(steps=1)
    before = (folder() / "adapter.safetensors").read_bytes()
    real = trajectories.Trajectories.draw

    def broken(self: Any, *args: Any) -> Any:
        window = real(self, *args)
        window.velocity.fill_(torch.nan)
        return window

    monkeypatch.setattr(trajectories.Trajectories, "draw", broken)
    with pytest.raises(ValueError, match=r"The loss of step 2 is nan; lower learning_rate \(now 0.01\) and write another name. What was saved before is whole"):
        train(steps=2)
    assert (folder() / "adapter.safetensors").read_bytes() == before and load_adapter(folder() / "adapter.safetensors").finite


def test_out_of_memory_keeps_what_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "train_step", failing_after(2, torch.cuda.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(ValueError, match="out of memory at 64 × 64 pixels; lower width and height under another name. Stopped after step 2; the adapter so far is"):
        train()
    assert load_adapter(folder() / "adapter.safetensors").facts.training["steps"] == 2 and said()["state"] == "failed"
    sample(budgeted(flux(), 0.7, adapter=load_adapter(folder() / "adapter.safetensors"), method="learned tokens", substitute="nothing"), 2)


def full(*args: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_room_for_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectories.os, "posix_fallocate", full)
    with pytest.raises(ValueError, match=r"dydit_training/t cannot be written to \(No space left on device\); free some space and queue it again"):
        train()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")])
def test_no_room_while_saving(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch and the operating system say it each in their way; what was there before is there, and is gone on from."""
    train(steps=1)
    before = {path.name: path.read_bytes() for path in folder().iterdir() if path.is_file()}

    def save(*args: Any) -> None:
        args[-1].write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(training, "SAVE_EVERY", 1)
        patch.setattr(torch, "save", lambda state, path: save(path))
        with pytest.raises(ValueError, match="cannot be written to .* What was saved before is whole"):
            train(steps=3)
    kept = set(before) - {"job.json"}
    assert {path.name for path in folder().iterdir() if path.is_file()} == set(before)
    assert all((folder() / name).read_bytes() == before[name] for name in kept)
    train(steps=3)
    assert len(losses()) == 3


def test_numbers_that_are_not_finite_are_never_an_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    train(steps=1)
    before = (folder() / "adapter.safetensors").read_bytes()
    finish = session.finish

    def broken(*args: Any) -> Any:
        adapter = finish(*args)
        adapter.scores.bias.fill_(torch.inf)
        return adapter

    monkeypatch.setattr(session, "finish", broken)
    with pytest.raises(ValueError, match="The gates hold numbers that are not finite after 2 steps; lower learning_rate"):
        train(steps=2)
    assert (folder() / "adapter.safetensors").read_bytes() == before
