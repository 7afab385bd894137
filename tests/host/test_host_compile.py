"""Under the stock compile node a run sees the same wrappers and guards as an artist's graph; each picture stays exact."""

from __future__ import annotations

import pytest
import torch
from tiny import DOUBLE, SINGLE, blocks, budgeted, flux, sample  # first: starts the host

from comfy.model_patcher import ModelPatcher
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from torch._dynamo.utils import counters


def compiled(model: ModelPatcher) -> ModelPatcher:
    """The stock node, with dynamo's own backend: graphs, guards and breaks are real, the code generator is left out."""
    model = model.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=model, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return model


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def check(model: ModelPatcher, budget: float | None) -> None:
    """`model` is compiled; the picture is the one without compile at this budget (None: no node)."""
    expected, found = sample(flux() if budget is None else budgeted(flux(), budget)), sample(model)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5, msg=lambda text: f"at budget {budget}: {text}")
    assert not [block for block in blocks(flux()) if "forward" in block.__dict__]


def test_moving_the_slider_on_a_compiled_model() -> None:
    """.5 → .8 → node taken out → .5 → 1.0. Kept counts stay out of the graphs: what was compiled once serves again."""
    base = compiled(flux())
    sample(budgeted(base, 0.5), 1)
    graphs = [counters["stats"]["unique_graphs"]]
    for budget in (0.5, 0.8, None, 0.5, 1.0, 0.5, None):
        check(base if budget is None else budgeted(base, budget), budget)
        graphs.append(counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2], "another step or another budget compiled again"
    # Dynamo may compile a graph or two when it first comes back from the untouched model; from then on nothing.
    assert graphs[2] < graphs[3] and graphs[5] - graphs[3] <= 2, "coming back compiled again"
    assert graphs[5] == graphs[6] == graphs[7], "every way has been compiled, and one was again"


BLOCK_KEYS = [f"diffusion_model.{stack}.{index}" for stack, count in (("double_blocks", DOUBLE), ("single_blocks", SINGLE))
              for index in range(count)]


@pytest.mark.parametrize("how", ["host's wrapper", "object patches"])
def test_compiling_block_by_block(how: str) -> None:
    """Compile nodes put compiled modules in the blocks' place; these run in parts all the same, and the picture is the same."""
    model = flux().clone(disable_dynamic=True)
    if how == "object patches":
        for key in BLOCK_KEYS:
            model.add_object_patch(key, torch.compile(model.get_model_object(key), backend="eager"))
    else:
        set_torch_compile_wrapper(model=model, backend="eager", keys=BLOCK_KEYS)
    expected = sample(budgeted(flux(), 0.5))
    for _ in range(2):  # as loaded for the first time, and again
        torch.testing.assert_close(sample(budgeted(model, 0.5)), expected, rtol=1e-5, atol=1e-5)
    sample(flux(), 1)  # loading another clone takes object patches away
    assert not [block for block in blocks(flux()) if "forward" in block.__dict__]


def test_compiling_after_the_node() -> None:
    check(compiled(budgeted(flux(), 0.5)), 0.5)
