"""DyDiT Train: the host's FLUX as a teacher, what it leaves behind, and how a training ends and goes on."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny import (CONTEXT, DOUBLE, POOLED, SIDE, SINGLE, TEXT, WIDTH, blocks, budgeted, flux, flux_file, last_trace, load_flux, prompt, put_back,  # first: starts the host
                  sample, transformer)
from trainings import PROMPTS, folder, losses, quick_and_clean, said, train  # noqa: F401 - the fixture works by being here

import comfy.model_management
from comfy.model_management import InterruptProcessingException
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_model_advanced import ModelSamplingFlux
from dydit_pack.dydit_core.checkpoints.adapter import load_adapter
from dydit_pack.dydit_core.models.flux import Flux, FluxConfig, to_file_key
from dydit_pack.dydit_core.train.examples import Examples
from dydit_pack.dydit_core.train.session import Job, begin, plan
from dydit_pack.dydit_core.train.session import train as train_in_core
from dydit_pack.dydit_core.train.teacher import Teacher, flux_teacher
from dydit_pack.nodes import teacher as teachers
from dydit_pack.nodes import training
from dydit_pack.nodes.train import recipe_of
from safetensors.torch import load_file

SIZE = (16, 8, 8)


def lora(model: ModelPatcher, size: float = 0.05) -> ModelPatcher:
    """With a change of one layer, as Load LoRA puts it there."""
    generator, patched = torch.Generator().manual_seed(4), model.clone()
    name = "diffusion_model.single_blocks.0.linear2.weight"
    weight = blocks(model)[1].linear2.weight
    patched.add_patches({name: ("diff", (size * torch.randn(weight.shape, generator=generator),))})
    return patched


def rows(count: int = 2) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(6)
    pairs = [prompt(seed)[0] for seed in range(count)]
    return (torch.randn(count, 16, SIDE, SIDE, generator=generator), torch.rand(count, generator=generator),
            torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1]["pooled_output"] for pair in pairs]))


def teacher(model: ModelPatcher) -> Teacher:
    return teachers.teacher_of(model, 3.5, SIZE, TEXT, 8)


@pytest.mark.parametrize("changed", [lambda model: model, lora], ids=["the model", "with a LoRA"])
def test_the_teacher_is_the_hosts_model(changed: Callable) -> None:
    model = changed(flux())
    x, sigma, context, pooled = rows()
    with teachers.training():
        mine = teacher(model).velocity(x, sigma, context, pooled)
    comfy.model_management.load_models_gpu([model])
    with torch.no_grad():
        denoised = model.model.apply_model(x, sigma, c_crossattn=context, y=pooled, guidance=torch.tensor([3.5]))
    theirs = (x - denoised) / sigma[:, None, None, None]
    assert (mine - theirs).abs().max() < 1e-5 * theirs.abs().max() / theirs.abs().mean()
    comfy.model_management.unload_all_models()
    put_back(flux())


def test_a_lora_changes_what_is_learned_from() -> None:
    inputs = rows()
    with teachers.training():
        plain, changed = (teacher(model).velocity(*inputs) for model in (flux(), lora(flux())))
    assert (plain - changed).abs().max() > 1e-2


def test_the_schedule_is_the_models_own() -> None:
    shifted, = ModelSamplingFlux().patch(flux(), 1.15, 0.5, 1024, 1024)
    with teachers.training():
        plain, moved = (teacher(model).schedule(4) for model in (flux(), shifted))
    assert plain[0] == moved[0] == 1.0 and plain[-1] == moved[-1] == 0.0 and len(plain) == 5
    assert plain != moved


def test_an_adapter_for_the_slider() -> None:
    adapter, plot = train(what="tokens + widths + low-rank", substitute="reuse")
    assert adapter.scores is not None and adapter.width is not None and adapter.low_rank is not None
    assert adapter.facts.training["steps"] == 4 and adapter.facts.substitutes == ("reuse",) and adapter.fit.warning(transformer(flux())) is None
    assert plot.ndim == 4 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1
    sample(budgeted(flux(), 0.6, adapter=adapter, method="learned tokens", substitute="reuse"), 4)
    assert last_trace().facts["achieved"] == pytest.approx(0.6, abs=0.02)


def test_losses_are_those_of_the_core() -> None:
    """The same weights in `dydit_core.models.flux`, without host, checkpointing and copies."""
    train(what="tokens + widths", substitute="reuse", seed=3)
    model, tensors = Flux(FluxConfig(WIDTH, DOUBLE, SINGLE, context_in_dim=CONTEXT, vec_in_dim=POOLED)), load_file(flux_file())
    model.load_state_dict({key: tensors[to_file_key(key)] for key in model.state_dict()})
    recipe = recipe_of("tokens + widths", "reuse", "3", 4, 8, 0.01)
    with teachers.training():
        schedule = teacher(flux()).schedule
    alone = flux_teacher(model.requires_grad_(False), schedule=schedule, products=torch.float32)
    pairs = [one[0] for one in PROMPTS]
    context, pooled = torch.cat([pair[0] for pair in pairs]), torch.cat([pair[1]["pooled_output"] for pair in pairs])
    examples = Examples((context, pooled), (torch.zeros_like(context[:1]), torch.zeros_like(pooled[:1])))
    job = Job(recipe, SIZE, "", "", runs=4, seed=3)
    data = plan(job, alone, examples, None)
    run = begin(job, alone, data, folder("core"))
    train_in_core(run, job, alone, data, folder("core"), lambda run: None)
    assert losses() == pytest.approx(run.losses, rel=2e-3)


def leftovers(model: ModelPatcher) -> list[str]:
    module = transformer(model)
    return [name for name, part in module.named_modules() if "forward" in vars(part)] + \
        [name for name, part in module.named_parameters() if part.requires_grad or part.grad is not None]


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_as_it_was(interrupted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = lora(flux())
    sample(model, 1)
    before = {key: (value.data_ptr(), value.clone()) for key, value in transformer(model).state_dict().items()}
    options = {key: dict(value) if isinstance(value, dict) else value for key, value in model.model_options.items()}
    if interrupted:
        interrupt_when(monkeypatch, lambda event: event["state"] == "training" and event["done"] == 2)
        with pytest.raises(InterruptProcessingException):
            train(model=model)
    else:
        train(model=model)
    after = transformer(model).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, (_, value) in before.items())
    assert not leftovers(model) and model.model_options == options and not model.object_patches
    assert not comfy.model_management.in_training
    comfy.model_management.unload_all_models()
    put_back(flux())


def interrupt_when(monkeypatch: pytest.MonkeyPatch, when: Callable[[dict], bool]) -> None:
    """Press the host's Cancel at an event; every one is sent."""
    monkeypatch.setattr(training, "_INTERVAL", 0.0)

    def sent(kind: str, event: dict) -> None:
        if kind == "dydit.training" and when(event):
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(training, "send", sent)


def test_an_interrupt_keeps_what_is_trained_and_queueing_again_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    train(name="whole", steps=6, substitute="reuse")
    with monkeypatch.context() as patch:
        interrupt_when(patch, lambda event: event["state"] == "training" and event["done"] == 3)
        with pytest.raises(InterruptProcessingException):
            train(steps=6, substitute="reuse")
    event = said()
    assert event["state"] == "interrupted" and event["done"] == 3 and event["steps"] == [3]
    assert f"Stopped after step 3; the adapter so far is {folder() / 'adapter.safetensors'}" in event["lines"][0]
    so_far = load_adapter(folder() / "adapter.safetensors")
    assert so_far.facts.training["steps"] == 3
    sample(budgeted(flux(), 0.7, adapter=so_far, method="learned tokens", substitute="reuse"), 3)
    assert last_trace().facts["achieved"] == pytest.approx(0.7, abs=0.02)
    adapter, _ = train(steps=6, substitute="reuse")
    assert losses() == losses("whole") and adapter.facts.training["steps"] == 6
    assert said()["state"] == "done" and said()["steps"] == [5, 6]


def test_an_interrupt_while_dense_runs_are_made_keeps_those(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        interrupt_when(patch, lambda event: event["state"] == "recording" and event["done"] == 12)
        with pytest.raises(InterruptProcessingException):
            train(runs=8)
    assert said()["state"] == "interrupted" and "Stopped before the first step" in said()["lines"][0] and not (folder() / "adapter.safetensors").exists()
    seen: list[dict] = []
    monkeypatch.setattr(training, "send", lambda _, event: seen.append(event))
    train(runs=8)
    assert seen[1]["state"] == "recording" and (seen[1]["done"], seen[1]["total"]) == (12, 24), "four of eight runs in three steps were there"


def test_more_steps_go_on_and_the_same_ones_take_none() -> None:
    train(steps=2)
    first = losses()
    train(steps=4)
    assert losses()[:2] == first and len(losses()) == 4
    adapter, _ = train(steps=4)
    assert len(losses()) == 4 and adapter.facts.training["steps"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_base_in_fewer_bits(dtype: torch.dtype) -> None:
    model, wanted = load_flux(dtype), {"what": "tokens + widths + low-rank", "steps": 2, "sampling_steps": "2", "width": 32}
    train(model=model, name="bits", **wanted)
    train(name="full", **wanted)
    assert losses("bits") == pytest.approx(losses("full"), abs=0.5) and not leftovers(model)


def test_products_in_bfloat16_teach_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {"what": "tokens + widths + low-rank", "substitute": "reuse", "steps": 2}
    train(name="full", **wanted)
    monkeypatch.setattr(teachers, "half_products", lambda patcher: True)
    train(name="half", **wanted)
    assert losses("half") == pytest.approx(losses("full"), abs=0.5) and losses("half") != losses("full")


def test_guided_runs_have_both_prompts() -> None:
    train(cfg=2.0, negative=[prompt(9)], steps=1)
    assert (folder() / "runs/3_velocity.bin").stat().st_size == 4 * 3 * 2 * 16 * 8 * 8 * 2


def test_pictures_say_the_size() -> None:
    latents = [{"samples": torch.randn(1, 16, 8, 12)} for _ in PROMPTS]
    train(latents=latents, steps=1)
    assert (folder() / "runs/3_x.bin").stat().st_size == 4 * 4 * 16 * 8 * 12 * 2


def test_prompts_of_another_length_are_left_out() -> None:
    train(positive=[*PROMPTS, prompt(7, TEXT + 4)], steps=1)
    assert said()["lines"][0].startswith("1 of 5 prompts are left out: they have more or fewer than 12 text tokens")


def test_a_budget_on_the_model_is_not_learned_from() -> None:
    train(model=budgeted(flux(), 0.5), steps=1, name="budgeted")
    train(steps=1)
    assert losses() == losses("budgeted")
