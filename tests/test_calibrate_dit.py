"""`calibrate`: a DyDiT's file with the quantiles of its routers' logits, read strictly, and what that does to its first evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from released_dit import SMALL, SMALL_ROUTERS, source, tensors
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dydit_core.budget import Plan
from dydit_core.checkpoints.convert import convert
from dydit_core.checkpoints.dit import DiTFile, find_dit
from dydit_core.checkpoints.dit_keys import RouterSizes
from dydit_core.checkpoints.files import FileError
from dydit_core.checkpoints.inspect import describe
from dydit_core.checkpoints.source import Entry, Source, open_source
from dydit_core.demo.class_model import load_class_model
from dydit_core.models.dit import EPS, FLOW, DiT, DiTConfig, timestep
from dydit_core.models.latte import LatteConfig
from dydit_core.routers.calibration import BINS, LEVELS
from dydit_core.runtime import Method
from dydit_core.sampling import eps_sigmas, sample, sigmas
from dydit_core.standalone import Budgeted, Spent
from dydit_core.substitutes.nothing import Nothing
from dydit_core.train import calibrate_dit
from dydit_core.train.calibrate_dit import calibrate_file, measure
from dydit_core.train.dynamic import Decisions, with_routers

CONFIG = DiTConfig(hidden_size=64, depth=4, num_heads=8, side=16, classes=10, learned_variance=False)
QUANTILES, EDGES = "table.quantiles", "table.edges"


def random_dydit(prediction: str) -> torch.nn.Module:
    """As training has it, with masks, about half of everything on."""
    torch.manual_seed(0)
    model = DiT(replace(CONFIG, prediction=prediction, learned_variance=prediction == EPS))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name != "pos_embed":
                value.copy_(torch.randn_like(value) * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3))
        made = with_routers(model)
        for block in made.blocks:
            for layer in (block.attn_rate.router, block.mlp_rate.router, block.token_selection.mlp_head[2]):
                layer.weight.normal_(std=0.5)
                layer.bias.normal_(std=0.3)
            block.token_selection.mlp_head[2].bias.zero_()
    return made.eval().requires_grad_(False)


def written(folder: Path, prediction: str = FLOW, dtype: torch.dtype = torch.float32) -> Path:
    found = {key: value.to(dtype).contiguous() for key, value in random_dydit(prediction).state_dict().items()}
    save_file(found, folder / f"{prediction}.safetensors", {"prediction": prediction, "heads": "8", "note": "kept"})
    return folder / f"{prediction}.safetensors"


def opened(path: Path) -> DiTFile:
    return find_dit(open_source(path))


def drawn_by_hand(model: torch.nn.Module, labels: Tensor, schedule: list[float]) -> list[list[Tensor]]:
    """Token logits of each evaluation by block, where everything is computed and then masked."""
    found: list[list[Tensor]] = []
    for block in model.blocks:
        block.token_selection.mlp_head.register_forward_hook(lambda _, inputs, out: found[-1].append(out.flatten()))
    x = schedule[0] * torch.stack([torch.randn(4, 16, 16, generator=torch.Generator().manual_seed(row)) for row in range(len(labels))])
    for now, following in zip(schedule, schedule[1:]):
        found.append([])
        sigma = torch.full((len(labels),), now)
        decisions = Decisions(model.embed_time(timestep(sigma, model.config.prediction), x.dtype))
        x = x + (following - now) * model.denoise_direction(x, sigma, labels, {"decisions": decisions})
    return found


# --- what is measured

@pytest.mark.parametrize("prediction, schedule", [(EPS, eps_sigmas), (FLOW, sigmas)])
def test_quantiles_are_those_of_all_logits(tmp_path: Path, prediction: str, schedule: Callable[[int], list[float]]) -> None:
    """In one evaluation, so that every range of noise has the same; classes 0, 3 and 6 of 10."""
    table = measure(opened(written(tmp_path, prediction)), pictures=3, steps=1)
    by_hand, = drawn_by_hand(random_dydit(prediction), torch.tensor([0, 3, 6]), schedule(1))
    assert table.quantiles.shape == (CONFIG.depth, BINS, LEVELS) and by_hand[0].numel() == 3 * CONFIG.tokens
    for block, logits in enumerate(by_hand):
        expected = torch.quantile(logits, torch.linspace(0, 1, LEVELS))
        torch.testing.assert_close(table.quantiles[block], expected.expand(BINS, -1), rtol=1e-4, atol=1e-4)
        assert 0.05 < (logits > 0).float().mean() < 0.95
    shares = table.edges if prediction == FLOW else table.edges / (1 + table.edges)
    torch.testing.assert_close(shares[:-1], torch.linspace(0.1, 0.9, 9))
    assert table.edges[-1] == pytest.approx(1.0 if prediction == FLOW else schedule(1)[0])


def test_each_noise_level_has_its_own(tmp_path: Path) -> None:
    """Sigmas 1, 0.75, 0.5 and 0.25 are in the ranges 9, 7, 4 and 2; the others have the nearest. Skipped tokens count."""
    table = measure(opened(written(tmp_path)), pictures=10, steps=4)
    by_hand = drawn_by_hand(random_dydit(FLOW), torch.arange(10), sigmas(4))
    for place, evaluation in zip(range(BINS), (3, 3, 3, 3, 2, 2, 1, 1, 1, 0)):
        for block in range(CONFIG.depth):
            expected = torch.quantile(by_hand[evaluation][block], torch.linspace(0, 1, LEVELS))
            torch.testing.assert_close(table.quantiles[block, place], expected, rtol=1e-3, atol=1e-3)


def test_the_seed_decides(tmp_path: Path) -> None:
    found = opened(written(tmp_path))
    one, same, other = (measure(found, 2, 2, seed).quantiles for seed in (0, 0, 5))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_progress_is_told_in_evaluations(tmp_path: Path) -> None:
    told = []
    measure(opened(written(tmp_path)), pictures=9, steps=2, progress=lambda done, total: told.append((done, total)))
    assert told == [(8, 18), (16, 18), (17, 18), (18, 18)]


# --- what is written and read

@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_file_is_the_same_with_a_table(tmp_path: Path, dtype: torch.dtype) -> None:
    path, out = written(tmp_path, dtype=dtype), tmp_path / "new" / "out.safetensors"
    calibrate_file(path, out, pictures=2, steps=2)
    before, after, table = load_file(path), load_file(out), measure(opened(path), 2, 2)
    assert after.keys() == {*before, QUANTILES, EDGES} and all(torch.equal(after[key], value) and after[key].dtype == dtype for key, value in before.items())
    assert torch.equal(after[QUANTILES], table.quantiles) and torch.equal(after[EDGES], table.edges)
    with safe_open(out, framework="pt") as file:
        assert file.metadata() == {"prediction": FLOW, "heads": "8", "note": "kept"}
    found = opened(out)
    assert found.calibrated and not opened(path).calibrated and found.config == opened(path).config
    routers = found.read_routers()
    assert torch.equal(routers.table.quantiles, table.quantiles) and torch.equal(routers.table.edges, table.edges)
    assert not routers.measures and not routers.needs_history and opened(path).read_routers().measures
    assert not [*out.parent.glob("*.new")] and [one.name for one in out.parent.iterdir()] == ["out.safetensors"]
    calibrate_file(out, tmp_path / "again.safetensors", pictures=2, steps=2)
    assert torch.equal(load_file(tmp_path / "again.safetensors")[QUANTILES], table.quantiles), "what it had does not count"


def test_convert_keeps_a_table_and_inspect_tells(tmp_path: Path) -> None:
    path, out = written(tmp_path, dtype=torch.float16), tmp_path / "out.safetensors"
    calibrate_file(path, out, pictures=1, steps=1)
    made = convert(out, tmp_path / "converted.safetensors")
    assert torch.equal(load_file(made.base)[QUANTILES], load_file(out)[QUANTILES]) and opened(made.base).calibrated
    assert "calibrated: any budget holds from the first evaluation on" in describe(out)
    assert "not calibrated: at a budget the first evaluation is dense (python -m dydit_core calibrate FILE OUT.safetensors)" in describe(path)
    save_file(tensors(routers=None), tmp_path / "plain.safetensors", {"prediction": EPS, "heads": "8"})
    assert not any("calibrate" in line for line in describe(tmp_path / "plain.safetensors"))


def header(shapes: dict[str, tuple[int, ...]], dtype: str = "F32", routers: RouterSizes | None = SMALL_ROUTERS) -> Source:
    """Of a file with these tensors."""
    found = source(SMALL, routers, prediction=EPS, heads="8")
    return replace(found, entries={**found.entries, **{key: Entry(key, dtype, shape) for key, shape in shapes.items()}})


def why_not(*made: object, **how: object) -> str:
    with pytest.raises(FileError) as caught:
        find_dit(found := header(*made, **how))
    return one_sentence(str(caught.value), found.path)


def one_sentence(text: str, path: Path) -> str:
    assert text.startswith(path.name) and text.endswith(".") and "\n" not in text and "; " in text
    return text


def test_a_table_that_does_not_fit() -> None:
    good = {QUANTILES: (2, 10, 33), EDGES: (10,)}
    assert find_dit(header(good)).calibrated
    assert "has a tensor table.quantiles, which belongs to routers, and has none; calibrate the file that it was made from" in why_not(good, routers=None)
    assert "lacks the tensor table.edges" in why_not({QUANTILES: (2, 10, 33)}) and "lacks the tensor table.quantiles" in why_not({EDGES: (10,)})
    assert "has table.quantiles in F16, and the table of routers is float32" in why_not(good, "F16")
    for wrong in ((3, 10, 33), (2, 0, 33), (2, 10, 1), (2, 33)):
        assert f"has table.quantiles of size {list(wrong)} where [2, noise levels, 2 or more]" in why_not({**good, QUANTILES: wrong})
    assert "has table.edges of size [9] where table.quantiles says [10]" in why_not({**good, EDGES: (9,)})
    assert "has a tensor table.other that no DiT" in why_not({**good, "table.other": (1,)})


@pytest.mark.parametrize("key, place, value, words", [(QUANTILES, (1, 3, 5), float("nan"), "numbers in table.quantiles that are not finite"),
                                                      (QUANTILES, (0, 9, 32), -1e6, "table.quantiles that do not rise from level to level"),
                                                      (EDGES, (9,), float("inf"), "numbers in table.edges that are not finite"),
                                                      (EDGES, (4,), 0.4, "table.edges that do not rise")])
def test_a_table_of_wrong_numbers(tmp_path: Path, key: str, place: tuple[int, ...], value: float, words: str) -> None:
    path, out = written(tmp_path), tmp_path / "out.safetensors"
    calibrate_file(path, out, pictures=1, steps=1)
    found = load_file(out)
    found[key][place] = found[EDGES][3] if value == 0.4 else value
    save_file(found, out, {"prediction": FLOW, "heads": "8"})
    with pytest.raises(FileError) as caught:
        opened(out).read_routers()
    assert words in one_sentence(str(caught.value), out)


# --- what is refused

def refused(path: Path, out: Path, **how: int) -> str:
    before = {one: one.read_bytes() for one in path.parent.rglob("*.safetensors")}
    with pytest.raises(FileError) as caught:
        calibrate_file(path, out, **how)
    assert {one: one.read_bytes() for one in path.parent.rglob("*.safetensors*")} == before, "nothing was written"
    return one_sentence(str(caught.value), path)


def test_files_that_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    torch.save({"ema": tensors()}, tmp_path / "a.pt")
    assert "is a PyTorch file (.pt); make a .safetensors of it first: python -m dydit_core convert FILE OUT.safetensors" in refused(tmp_path / "a.pt", out)
    save_file(tensors(routers=None), tmp_path / "plain.safetensors", {"prediction": EPS, "heads": "8"})
    assert "is a DiT-64×2/2, 64², 2 blocks, 10 classes, no routers; choose a DyDiT" in refused(tmp_path / "plain.safetensors", out)
    save_file({"lora_unet_a.lora_down.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "is no DyDiT; choose one (python -m dydit_core inspect FILE says" in refused(tmp_path / "lora.safetensors", out)
    assert "is not a file" in refused(tmp_path / "gone.safetensors", out)


def test_places_that_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path)
    assert "would be written over itself; name another file" in refused(path, path)
    (tmp_path / "there.safetensors").write_bytes(b"mine")
    assert "there.safetensors, which is there already; name another file" in refused(path, tmp_path / "there.safetensors")
    assert "is no name of a .safetensors" in refused(path, tmp_path) and "out.pt is no name of a .safetensors" in refused(path, tmp_path / "out.pt")
    assert f"{1000 * 1000 * 64} logits in each block" in refused(path, tmp_path / "out.safetensors", pictures=1000, steps=1000)


def test_a_model_that_draws_nothing_finite(tmp_path: Path) -> None:
    found = load_file(written(tmp_path))
    found["blocks.0.attn.proj.bias"].fill_(1e38)
    save_file(found, tmp_path / "wild.safetensors", {"prediction": FLOW, "heads": "8"})
    assert "gives logits that are not finite (NaN or infinity) while it draws" in refused(tmp_path / "wild.safetensors", tmp_path / "out.safetensors", pictures=1, steps=2)


# --- the command

def called(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    calibrate_dit.add_arguments(parser)
    calibrate_dit.run(parser.parse_args([str(one) for one in arguments]))


def test_what_the_command_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path, out = written(tmp_path), tmp_path / "out.safetensors"
    called(path, out, "--pictures", 2, "--steps", 3, "--device", "cpu")
    said = capsys.readouterr()
    assert said.out == (f"{out}\n    DySiT-64×4/2, 128², 4 blocks, 10 classes, routers for 8 heads, 8 channel groups and tokens, "
                        "calibrated on 2 pictures of 3 steps: any budget holds from the first evaluation on\n")
    assert said.err.endswith("\r100 % of 6 evaluations of a picture\n") and opened(out).calibrated
    with pytest.raises(SystemExit, match="which is there already"):
        called(path, out)


@pytest.mark.parametrize("flags, words", [(("--device", "abacus"), "no device abacus here"), (("--pictures", "0"), "0 is no number from 1 on"),
                                          (("--steps", "-1"), "-1 is no number from 1 on")])
def test_flags_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture, flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(SystemExit):
        called(tmp_path / "a.safetensors", tmp_path / "b.safetensors", *flags)
    assert words in capsys.readouterr().err


def test_an_interrupted_command_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*args: object, **how: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_dit, "sample", stop)
    path = written(tmp_path)
    with pytest.raises(SystemExit, match="Stopped; nothing was written"):
        called(path, tmp_path / "out.safetensors")
    assert [*tmp_path.iterdir()] == [path]


# --- what it is for

@pytest.mark.parametrize("prediction", [EPS, FLOW])
@pytest.mark.parametrize("budget", [0.8, 0.6])
def test_four_steps_meet_a_budget_from_the_first_evaluation_on(tmp_path: Path, prediction: str, budget: float) -> None:
    path, out = written(tmp_path, prediction), tmp_path / "out.safetensors"
    calibrate_file(path, out)
    plain, calibrated = spent_by(path, budget), spent_by(out, budget)
    assert calibrated.achieved == pytest.approx(budget, rel=0.02)
    assert calibrated.evaluations[0].flops < 0.95 and calibrated.evaluations[0].computed < 0.97
    assert plain.evaluations[0].computed == 1.0 and plain.evaluations[0].flops > 0.99
    own = [load_class_model(file).draw(torch.arange(2), 4, method=Method(opened(file).read_routers().by_threshold(), Nothing())) for file in (path, out)]
    assert torch.equal(own[0][0], own[1][0]) and own[0][1] == own[1][1], "the file's own threshold is what it was"


def spent_by(file: Path, budget: float) -> Spent:
    """Of 4 steps with two pictures."""
    drawn = load_class_model(file)
    schedule = drawn.schedule(4)
    noise = schedule[0] * torch.randn(2, *drawn.model.config.latent_size, generator=torch.Generator().manual_seed(1))
    with Budgeted(drawn.model, Plan(budget), Method(drawn.routers, Nothing()), schedule[:-1]) as budgeted:
        sample(budgeted, (torch.arange(2),), noise, 4, schedule=schedule)
    return budgeted.spent


def test_a_dynamic_latte_too(tmp_path: Path) -> None:
    shape = LatteConfig(hidden_size=64, depth=2, num_heads=8, side=8, frames=3)
    found = {key: value * (value.shape[-1] ** -0.5 if value.ndim > 1 else 0.3) for key, value in tensors(shape, SMALL_ROUTERS).items()}
    save_file(found, tmp_path / "latte.safetensors", {"heads": "8"})
    calibrate_file(tmp_path / "latte.safetensors", tmp_path / "out.safetensors", pictures=2, steps=2)
    assert opened(tmp_path / "out.safetensors").read_routers().table.quantiles.shape == (2, BINS, LEVELS)
    spent = spent_by(tmp_path / "out.safetensors", 0.7)
    assert spent.achieved == pytest.approx(0.7, rel=0.02) and spent.evaluations[0].flops < 0.8
