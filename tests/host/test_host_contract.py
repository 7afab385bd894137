"""The restated FLUX blocks against the host's own: equal at full capacity, whatever the graph brings along."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny import BLOCKS, CONTEXT, POOLED, TEXT, budgeted, flux, load_flux, sample, transformer  # first: starts the host

from comfy.ldm.flux import layers
from dydit_pack.dydit_core.budget import Plan
from dydit_pack.dydit_core.families.flux import FluxFamily
from dydit_pack.dydit_core.parts import Geometry, Substitute
from dydit_pack.dydit_core.routers.change import ChangeRouter
from dydit_pack.dydit_core.runtime import Branches, Method, Run, running
from dydit_pack.dydit_core.substitutes.history import Reuse
from dydit_pack.dydit_core.substitutes.nothing import Nothing
from dydit_pack.nodes.model import BACKEND, geometry_of
from torch import Tensor, nn

HERE = "comfy/ldm/flux/layers.py of this host"


def inputs(rows: int = 1, size: tuple[int, int] = (16, 16), dtype: torch.dtype = torch.float32) -> dict:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {"x": random(rows, 16, *size), "timestep": torch.full((rows,), 0.7, dtype=dtype),
            "context": random(rows, TEXT, CONTEXT), "y": random(rows, POOLED)}


@torch.inference_mode()
def dense(model: nn.Module, call: dict) -> Tensor:
    return model(**call, transformer_options={})


@torch.inference_mode()
def in_parts(model: nn.Module, call: dict, substitute: Substitute | None = None) -> Tensor:
    """The host's model with our restated blocks in place of its own, every token computed."""
    geometry, grid = geometry_of(model, call["x"], call["context"], call.get("ref_latents"))
    run, rows = Run(Plan(1.0), Method(ChangeRouter(), substitute or Reuse()), [0.7]), call["x"].shape[0]
    run.arrive(0.7)
    with running(run, FluxFamily(), model, geometry, Branches.cond_only(rows), rows, grid, BACKEND):
        out = model(**call, transformer_options={})
    run.finish()
    assert run.ledger.achieved == 1.0  # booked, so the stand-ins ran and computed everything
    return out


def residuals(rows: int, tokens: int) -> dict[str, list]:
    """What FLUX ControlNets hand over: some blocks only, and fewer tokens than the picture has."""
    generator = torch.Generator().manual_seed(4)

    def random(count: int) -> Tensor:
        return torch.randn(rows, count, 256, generator=generator)

    return {"input": [random(tokens)], "output": [None, random(tokens - 8)]}


def token_mask(rows: int, tokens: int) -> Tensor:
    return torch.randn(rows, tokens, tokens, generator=torch.Generator().manual_seed(8)) * 2


def references() -> list[Tensor]:
    generator = torch.Generator().manual_seed(6)
    return [torch.randn(1, 16, 12, 8, generator=generator), torch.randn(1, 16, 6, 10, generator=generator)]


GRAPHS = {
    "plain": lambda: inputs(),
    "batch": lambda: inputs(2),
    "odd size": lambda: inputs(size=(15, 11)),
    "mask": lambda: {**inputs(2), "attention_mask": token_mask(2, 64 + TEXT)},
    "one mask for the batch": lambda: {**inputs(2), "attention_mask": token_mask(1, 64 + TEXT)},
    "mask without batch": lambda: {**inputs(2), "attention_mask": token_mask(1, 64 + TEXT)[0]},
    "controlnet": lambda: {**inputs(2), "control": residuals(2, 64)},
    **{f"references by {method}": lambda method=method: {**inputs(), "ref_latents": references(), "ref_latents_method": method}
       for method in ("offset", "index", "uxo")},
}


@pytest.mark.parametrize("substitute", [Reuse(), Nothing()], ids=["reuse", "nothing"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_full_capacity_is_the_hosts_own_forward(graph: str, substitute: Substitute) -> None:
    model, call = transformer(flux()), GRAPHS[graph]()
    expected = dense(model, call)
    assert expected.std() > 0.1
    torch.testing.assert_close(in_parts(model, call, substitute), expected, rtol=1e-6, atol=1e-6 * float(expected.abs().max()))


def test_half_precision_clamps_as_the_host_does() -> None:
    """Residuals beyond ±65504 are common in FLUX at fp16; the clamp must come at the same place."""
    model = transformer(load_flux(torch.float16))
    call = inputs(2, dtype=torch.float16)
    ordinary = dense(model, call)
    torch.testing.assert_close(in_parts(model, call), ordinary, rtol=0, atol=4e-3 * float(ordinary.abs().max()))

    last = model.double_blocks[-1]
    with torch.no_grad():
        for linear in (last.txt_mlp[2], model.single_blocks[0].linear2):
            linear.bias.fill_(60000)
        for mod in (last.txt_mod, model.single_blocks[0].modulation):
            mod.lin.bias.fill_(30)
    seen: list[float] = []
    hook = model.single_blocks[-1].register_forward_pre_hook(lambda _, args: seen.append(float(args[0].abs().max())))
    expected, found = dense(model, call), in_parts(model, call)
    hook.remove()
    assert seen == [65504.0, 65504.0] and torch.isfinite(expected).all()
    torch.testing.assert_close(found, expected, rtol=0, atol=4e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("cfg", [1.0, 4.0])
def test_cond_and_uncond_in_one_batch(cfg: float) -> None:
    """One step of a run that reuses is dense: the picture through the restated blocks is the host's."""
    plain, found = sample(flux(), 1, cfg), sample(budgeted(flux(), 0.5), 1, cfg)
    torch.testing.assert_close(found, plain, rtol=1e-5, atol=1e-5)


def test_modulation_ranges_are_refused_by_name() -> None:
    """FLUX.2 has them; in this host they break a FLUX.1 too, deep in a block and without a word on the cause."""
    call = {**inputs(), "ref_latents": references(), "ref_latents_method": "index_timestep_zero"}
    with pytest.raises(ValueError, match=r"index_timestep_zero.*Use another reference method, or set the budget to 1\.0"):
        in_parts(transformer(flux()), call)


SIGNATURES = {
    "DoubleStreamBlock": "img txt vec pe attn_mask modulation_dims_img modulation_dims_txt transformer_options",
    "SingleStreamBlock": "x vec pe attn_mask modulation_dims transformer_options",
    "Modulation": "vec",
    "QKNorm": "q k v",
}
DOUBLE_PARTS = """num_heads hidden_size img_mod.lin img_mod.is_double txt_mod.lin img_norm1 img_norm2 txt_norm1 txt_norm2
    img_attn.qkv img_attn.norm.query_norm img_attn.norm.key_norm img_attn.proj txt_attn.qkv txt_attn.norm txt_attn.proj
    img_mlp.0 img_mlp.1 img_mlp.2 txt_mlp.0 txt_mlp.2""".split()
SINGLE_PARTS = """num_heads hidden_size mlp_hidden_dim linear1.out_features linear2.in_features norm.query_norm norm.key_norm
    pre_norm modulation.lin mlp_act""".split()


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_have_not_moved(name: str) -> None:
    found = list(inspect.signature(getattr(layers, name).forward).parameters)[1:]
    assert found == SIGNATURES[name].split(), f"{name}.forward in {HERE} has other parameters: families/flux.py must follow"


def _lacks(block: nn.Module, paths: list[str]) -> list[str]:
    missing = []
    for path in paths:
        here = block
        for part in path.split("."):
            here = getattr(here, part, None)
        if here is None:
            missing.append(path)
    return missing


@pytest.mark.parametrize("stack, paths", [("double_blocks", DOUBLE_PARTS), ("single_blocks", SINGLE_PARTS)])
def test_parts_have_not_moved(stack: str, paths: list[str]) -> None:
    block = getattr(transformer(flux()), stack)[0]
    assert not _lacks(block, paths), f"{type(block).__name__} in {HERE} lost what families/flux.py drives"


def test_modules_have_not_gained_a_part() -> None:
    """A part that appears in the host's block is one that the restated block leaves out."""
    def names(block: nn.Module) -> set[str]:
        return {name for name, _ in block.named_children()}

    model = transformer(flux())
    double = {f"{stream}_{part}" for stream in ("img", "txt") for part in ("mod", "norm1", "norm2", "attn", "mlp")}
    assert names(model.double_blocks[0]) == double
    assert names(model.single_blocks[0]) == {"modulation", "pre_norm", "linear1", "linear2", "norm", "mlp_act"}
    assert isinstance(model.double_blocks[0].img_mlp[1], nn.GELU) and model.double_blocks[0].img_mlp[1].approximate == "tanh"
    assert isinstance(model.single_blocks[0].mlp_act, nn.GELU) and model.single_blocks[0].mlp_act.approximate == "tanh"
    assert len(model.double_blocks) + len(model.single_blocks) == BLOCKS


def test_the_host_sees_the_sizes_we_do() -> None:
    """Odd sizes and references: our count of image tokens is the one that reaches the blocks."""
    model = transformer(flux())
    for call in (GRAPHS["odd size"](), GRAPHS["references by offset"]()):
        geometry, grid = geometry_of(model, call["x"], call["context"], call.get("ref_latents"))
        seen: list[int] = []
        hook = model.double_blocks[0].register_forward_pre_hook(lambda *a: seen.append(a[-1]["img"].shape[1]), with_kwargs=True)
        dense(model, call)
        hook.remove()
        assert seen == [geometry.image_tokens] and geometry == Geometry(seen[0], TEXT, 256, 4.0)
        assert grid == (-(-call["x"].shape[2] // 2), -(-call["x"].shape[3] // 2))
