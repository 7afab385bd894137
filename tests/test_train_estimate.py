"""Gradient checkpointing, and what `train --dry-run` counts and measures."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from training import CONFIG, train, write_base, write_examples

from dydit_core import flops
from dydit_core.lora import LoRA, save_lora
from dydit_core.models.flux import FluxConfig
from dydit_core.parts import Geometry
from dydit_core.train.bases import add_lora, empty_model, load_base, read_base, teacher_of
from dydit_core.train.estimate import CARD_FLOPS, CARD_SHARE, Bench, Cost, memory, saved_bytes, sizes_of, totals, trained_numbers
from dydit_core.train.gates import Past, TrainingPass
from dydit_core.train.router import Recipe, new_gates
from dydit_core.train.kinds import KINDS
from dydit_core.train.settings import Settings, read_settings
from dydit_core.train.subject import recipe_of
from dydit_core.train.teacher import Teacher

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
DEV = FluxConfig(guidance_embed=True)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "tiny.safetensors", torch.bfloat16, replace(CONFIG, depth_single_blocks=3))


def tiny(file: Path, **more: object) -> Settings:
    return read_settings({"base": str(file), "width": "128", "height": "64", "steps": "10", "runs": "3", "sampling_steps": ["4", "6"], "group": "2", "batch": "4",
                          "save_every": "4", "precision": "fp32", **more}, None)


def test_recomputed_blocks_learn_the_same_and_keep_less(file: Path) -> None:
    model = load_base(read_base(file), CPU, torch.float32)
    teachers = [teacher_of(model, torch.float32, 1.0, 3.5, checkpointing) for checkpointing in (False, True)]
    gates = new_gates(teachers[0], Recipe(1, reuse=True, groups=4, experts=2))
    generator = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(sizes, generator=generator) for sizes in ((2, 4, 8, 8), (2, 5, 8), (2, 8)))
    past = Past({block: torch.randn(2, 16, 128, generator=generator) for block in range(4)})

    def loss(teacher: Teacher) -> tuple[torch.Tensor, TrainingPass]:
        current = TrainingPass(gates, 5, torch.full((2,), 0.5), past=past)
        return teacher.gated(current, x, torch.full((2,), 0.5), context, pooled).square().mean(), current

    found = []
    for teacher in teachers:
        gates.zero_grad()
        value, current = loss(teacher)
        left = dict(current.history.values)
        value.backward()
        assert all(current.history.values[block] is left[block] for block in left), "the second run writes nowhere that is kept"
        found.append((value.item(), [param.grad.clone() for param in gates.parameters()]))
    assert found[0][0] == found[1][0] and any(grad.abs().max() > 0 for grad in found[0][1])
    for plain, again in zip(found[0][1], found[1][1]):
        assert torch.equal(plain, again)
    kept = [saved_bytes(lambda: loss(teacher)[0], list(model.parameters())) for teacher in teachers]
    assert kept[1] < kept[0] / 3


def test_flops_of_a_block_are_those_of_the_table(file: Path) -> None:
    settings = tiny(file, checkpointing=True)
    sizes = sizes_of(settings)
    assert sizes.geometry == Geometry(32, 256, 128)
    bench = Bench(sizes, settings, CPU)
    for index, cost in enumerate((flops.flux_double(sizes.geometry), flops.flux_single(sizes.geometry))):
        measured = bench.cost(index)
        assert measured.forward == cost.at(32)
        # Run, run again, and the gradient of every product's input, where fused attention makes five products of its two.
        attention = flops.attention(288, 288, 128)
        assert measured.training == pytest.approx(3 * (cost.at(32) - attention) + 4.5 * attention, rel=0.01)
        # Kept are its inputs; what is inside is much more.
        assert measured.kept[0] == pytest.approx(288 * 128 * 4, rel=0.05) and measured.again[0] > 5 * measured.kept[0]


def test_a_run_is_counted_as_by_hand(file: Path) -> None:
    settings = tiny(file)
    sizes = sizes_of(settings)
    # Three runs of 4 and of 6 evaluations; 10 steps of 4 windows of 2, each after a dense evaluation; 512 evaluations to calibrate the last
    # adapter and 64 for each of two saves, in windows of 2 after a dense one.
    assert sizes.evaluations == {"dense runs": (30, 0), "training steps": (40, 80), "calibration": (640 * 1.5, 0)}
    aligned = replace(sizes, recipe=replace(sizes.recipe, align=1.0))
    assert aligned.evaluations["training steps"] == (120, 80), "a dense evaluation more for each gated one"
    cost = Cost(1.0, 3.0, 0.5, 2.0, (100.0, 10.0), (1000.0, 0.0))
    other = Cost(10.0, 30.0, 5.0, 20.0, (200.0, 0.0), (500.0, 0.0))
    # One double block and three single ones.
    assert totals(sizes, (cost, other))["training steps"] == (40 * 31 + 80 * 93, 40 * 15.5 + 80 * 62)
    held = memory(sizes, Bench(sizes, settings, CPU), (cost, other))
    assert held["kept for the gradient"] == 2 * (210 + 3 * 400) and held["a block computed again"] == 2000
    assert held["history to reuse"] == 3 * 4 * 2 * 32 * 128 * 4
    assert held["base"] == sum(tensor.numel() * tensor.element_size() for tensor in load_base(read_base(file), CPU, torch.float32).state_dict().values())
    # Latents in half precision: 4 channels of 8 × 16, all points and velocities of the runs.
    assert sizes.disk == 2 * 4 * 8 * 16 * 3 * (5 + 4 + 7 + 6)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_trained_is_small(kind: str) -> None:
    recipe = recipe_of(read_settings({"base": "flux-dev", "kind": kind}, None))
    base = sum(param.numel() for param in empty_model(DEV).parameters())
    assert base > 11.8e9 and trained_numbers(DEV, recipe) < 0.015 * base


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 reads no TOML")
def test_flux_dev_is_a_matter_of_a_night() -> None:
    """From the FLOPs of the blocks alone; training takes 3.1 times those of a forward (see the test of them above)."""
    settings = replace(read_settings({}, ROOT / "docs/train_flux_dev.toml"), base="flux-dev")
    sizes = sizes_of(settings)
    costs = tuple(Cost(block.at(1024), 3.1 * block.at(1024), 0, 0, (0, 0), (0, 0))
                  for block in (flops.flux_double(sizes.geometry), flops.flux_single(sizes.geometry)))
    hours = sum(counted for counted, _ in totals(sizes, costs).values()) / CARD_FLOPS / CARD_SHARE / 3600
    assert 1 < hours < 8


def test_a_checkpoint_with_everything_in_it_holds_the_base_too(file: Path, tmp_path: Path) -> None:
    whole = {f"model.diffusion_model.{key}": value for key, value in load_file(file).items()}
    save_file({**whole, "vae.decoder.conv_in.weight": torch.zeros(1)}, tmp_path / "all.safetensors")
    models = [load_base(read_base(path), CPU, torch.float32).state_dict() for path in (file, tmp_path / "all.safetensors")]
    assert models[0].keys() == models[1].keys() and all(torch.equal(models[0][name], models[1][name]) for name in models[0])
    assert models[0]["single_blocks.0.linear1.weight"].dtype == torch.bfloat16 and models[0]["img_in.weight"].dtype == torch.float32


def test_a_lora_is_merged(file: Path, tmp_path: Path) -> None:
    model = load_base(read_base(file), CPU, torch.float32)
    before, name = model.get_submodule("double_blocks.0.img_mlp.0").weight.float().clone(), "double_blocks.0.img_mlp.0"
    save_lora(tmp_path / "lora.safetensors", LoRA({name: (torch.ones(2, 128), torch.ones(512, 2))}), {})
    add_lora(model, tmp_path / "lora.safetensors")
    torch.testing.assert_close(model.get_submodule(name).weight.float(), before + 2, rtol=0.01, atol=0)


def test_a_dry_run_tells_what_it_takes(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = write_examples(tmp_path / "latents.safetensors", latents=True)
    train("--base", file, "--examples", examples, "--work", tmp_path / "work", "--dry-run", "--device", "cpu")
    said = capsys.readouterr().out
    assert "width 128, 1 + 3 blocks, stored as bfloat16" in said and "16 image and 5 text tokens" in said
    assert "A 24 GB card: fits" in said and "Estimated, not measured: the RTX 4090 at 40% of its 165 TFLOPS" in said
    assert not (tmp_path / "work").exists()
