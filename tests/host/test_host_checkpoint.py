"""Files of the DyDiT authors' kind in the host: loaded, and sampled by their own threshold and by the slider."""

from __future__ import annotations

import inside  # noqa: F401 - first: makes `comfy` and `dydit_pack` importable

from pathlib import Path

import folder_paths
import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import flux_to_diffusers
from dit_files import models  # noqa: F401 - the fixture works by being here
from dydit_pack.dydit_core.checkpoints.convert import convert
from dydit_pack.dydit_core.checkpoints.fit import Fit, Layout
from dydit_pack.dydit_core.checkpoints.flux_keys import ROUTER, Sizes, base_keys, router_keys, router_shapes
from dydit_pack.dydit_core.checkpoints.routers import Routers
from dydit_pack.dydit_core.trace import Trace
from dydit_pack.nodes import budget, host
from dydit_pack.nodes.adapter import DyDiTAdapterLoader
from dydit_pack.nodes.checkpoint import DyDiTCheckpointLoader, load_base
from safetensors.torch import load_file, save_file
from tiny import BLOCKS, CONTEXT, DOUBLE, POOLED, SINGLE, WIDTH, as_node, budgeted, flux, flux_file, last_trace, prompt, sample
from torch import Tensor

LAYOUT = Layout(WIDTH, DOUBLE, SINGLE)
SIZES = Sizes(LAYOUT, patch=64, context=CONTEXT, pooled=POOLED, embedding=256, head=128, hidden=4 * WIDTH, guidance=False)


def routers(bias: float = 0.0) -> dict[str, Tensor]:
    """Under BFL's block names; every block lets about half of the tokens through."""
    generator = torch.Generator().manual_seed(11)
    scale = {"linear_t.weight": 0.02, "linear_t.bias": 0.1, "norm.bias": 0.1, "router.weight": 0.1, "router.bias": 0.0}
    found = {}
    for key, shape in router_shapes(LAYOUT).items():
        part = key.partition(f"{ROUTER}.")[2]
        found[key] = 1.0 + torch.zeros(shape) if part == "norm.weight" else scale[part] * torch.randn(shape, generator=generator)
        if part == "router.bias":
            found[key] += bias
    return found


def in_diffusers_layout(base: dict[str, Tensor]) -> dict[str, Tensor]:
    """`base` and the routers under diffusers' names, by the host's own map."""
    names = flux_to_diffusers({"depth": DOUBLE, "depth_single_blocks": SINGLE, "hidden_size": WIDTH})
    found = {}
    for theirs, target in names.items():
        ours, cut = (target, None) if isinstance(target, str) else (target[0], target[1])
        ours = ours.replace("_norm.weight", "_norm.scale")
        if ours not in base or "linear_in" in theirs or "linear_out" in theirs or "to_qkv" in theirs or ".attn.to_out.w" in theirs:
            continue
        value = base[ours] if cut is None else base[ours].narrow(*cut)
        found[theirs] = (torch.cat(value.chunk(2)[::-1]) if theirs.startswith("norm_out") else value).contiguous()
    both = router_keys(LAYOUT, diffusers=True)
    return found | {both[key]: value for key, value in routers().items()}


@pytest.fixture(scope="module")
def combined(models: Path) -> Path:
    save_file(load_file(flux_file()) | routers(), models / "both.safetensors")
    return models / "both.safetensors"


def load(path: Path) -> tuple[ModelPatcher, Routers]:
    return as_node(DyDiTCheckpointLoader).EXECUTE_NORMALIZED(checkpoint_name=path.name).result


def kept(trace: Trace) -> np.ndarray:
    """Tokens [evaluations, blocks, rows]."""
    return np.stack([evaluation.mask().sum(2) for evaluation in trace.evaluations])


def lines(sent: list) -> list[str]:
    return [line for _, event in sent for line in event.get("lines", ())]


def test_our_map_is_the_hosts() -> None:
    """Every key that the host would find in a diffusers file lies where ours says."""
    names = flux_to_diffusers({"depth": DOUBLE, "depth_single_blocks": SINGLE, "hidden_size": WIDTH})
    for ours, parts in base_keys(SIZES).items():
        start = 0
        for theirs in parts:
            target = names[theirs]
            name, cut = (target, None) if isinstance(target, str) else (target[0], target[1])
            assert name == ours.replace("_norm.scale", "_norm.weight")
            if cut is not None:
                assert cut[1] == start
                start += cut[2]


def test_the_model_is_that_of_the_base_alone(combined: Path) -> None:
    model, adapter = load(combined)
    assert adapter.fit.layout == LAYOUT and adapter.fit.warning(model.get_model_object("diffusion_model")) is None
    assert torch.equal(sample(model, 2), sample(flux(), 2))
    assert not any(ROUTER in key for key in model.model.diffusion_model.state_dict())


def test_the_hosts_copy_of_its_own(combined: Path) -> None:
    model, _ = load(combined)
    make, arguments = model.cached_patcher_init
    assert make is load_base and torch.equal(sample(make(*arguments), 2), sample(flux(), 2))


def test_the_files_own_threshold(combined: Path) -> None:
    """Rows of one batch keep different numbers of tokens; the slider changes nothing."""
    model, adapter = load(combined)
    pictures = [sample(budgeted(model, budget, adapter=adapter, method="checkpoint"), 3, batch=2) for budget in (0.3, 0.9)]
    counts = kept(last_trace())
    assert torch.equal(*pictures) and not torch.equal(pictures[0], sample(flux(), 3, batch=2))
    assert counts.shape == (3, BLOCKS, 2) and (counts[..., 0] != counts[..., 1]).any()
    assert 0 < counts.mean() < 64 and (counts[0] < 64).any()  # from the first evaluation on


def test_the_slider(combined: Path) -> None:
    model, adapter = load(combined)
    sample(budgeted(model, 0.7, adapter=adapter), 8, batch=2)
    trace = last_trace()
    counts = kept(trace)
    assert abs(trace.facts["achieved"] - 0.7) < 0.02
    assert (counts[0] == 64).all() and (counts[1:] < 64).any() and (counts[..., 0] == counts[..., 1]).all()
    assert len(set(counts[4, :, 0].tolist())) > 1  # one threshold over all blocks: not the same number in each


def test_in_diffusers_layout(combined: Path, models: Path) -> None:
    path = models / "diffusers.safetensors"
    save_file(in_diffusers_layout(load_file(flux_file())), path)
    (model, adapter), (expected, same) = load(path), load(combined)
    settings = {"method": "checkpoint"}
    assert torch.equal(sample(budgeted(model, adapter=adapter, **settings), 2), sample(budgeted(expected, adapter=same, **settings), 2))


def test_two_files_as_convert_writes_them(combined: Path, models: Path, tmp_path: Path) -> None:
    save_file(in_diffusers_layout(load_file(flux_file())), tmp_path / "a.safetensors")
    made = convert(tmp_path / "a.safetensors", tmp_path)
    folder = Path(folder_paths.get_folder_paths("dydit")[0])
    folder.mkdir(parents=True, exist_ok=True)
    made.routers.rename(folder / "routers.safetensors")
    adapter = as_node(DyDiTAdapterLoader).EXECUTE_NORMALIZED(adapter_name="routers.safetensors").result[0]
    one = sample(budgeted(flux(), adapter=adapter, method="checkpoint"), 2)
    model, same = load(combined)
    assert torch.equal(one, sample(budgeted(model, adapter=same, method="checkpoint"), 2))


def test_what_the_node_says(combined: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list = []
    for module in (budget, host):
        monkeypatch.setattr(module, "send", lambda *event: sent.append(event))
    model, adapter = load(combined)
    sample(budgeted(model, 0.75, adapter=adapter, method="checkpoint"), 2)
    said = lines(sent)
    assert said[0] == "The file's own threshold decides what is computed; the slider is ignored."
    assert f"checkpoint × nothing. {said[0]}" in said
    assert any(line.startswith("The prompt has 12 text tokens and this router was trained with 256") for line in said)
    assert any(line.startswith("Spent ") and "checkpoint × nothing" in line for line in said) and not any("Asked" in line for line in said)
    sent.clear()
    sample(budgeted(model, 0.75, adapter=adapter), 2, positive=prompt(1, 256), negative=prompt(2, 256))
    assert any(line.startswith("learned tokens × nothing") for line in lines(sent)) and not any("text tokens" in line for line in lines(sent))


def refusal(path: Path) -> str:
    with pytest.raises(ValueError) as caught:
        load(path)
    assert str(caught.value).endswith(".") and "\n" not in str(caught.value)
    return str(caught.value)


def test_files_that_are_refused(combined: Path, models: Path) -> None:
    torch.save({"module": routers()}, models / "released.pt")
    text = refusal(models / "released.pt")
    assert f"python -m dydit_core convert {models / 'released.pt'} OUT" in text and "DyDiT Adapter Loader" in text
    save_file(load_file(flux_file()), models / "plain.safetensors")
    assert "has no token routers in it (token_selection); load it with Load Diffusion Model" in refusal(models / "plain.safetensors")
    some = load_file(combined)
    del some["single_blocks.1.token_selection.norm.weight"]
    save_file(some, models / "lacking.safetensors")
    assert "lacks the tensor single_blocks.1.token_selection.norm.weight" in refusal(models / "lacking.safetensors")
    assert "is not in models/diffusion_models" in refusal(models / "gone.safetensors")


def test_routers_of_another_layout(models: Path) -> None:
    other = Routers(Path("x"), Fit("Other", Layout(WIDTH, 8, 38)), ())
    with pytest.raises(ValueError, match="8 double and 38 single"):
        budgeted(flux(), adapter=other)


def test_prompts_saved_before_there_were_dits_still_run() -> None:
    assert set(DyDiTCheckpointLoader.INPUT_TYPES()["required"]) == {"checkpoint_name"}
