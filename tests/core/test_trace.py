"""What was computed where: nothing is lost in packing, means are those of the maps, and nothing grows without bound."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dydit_core.trace import MAP_SIDE, Bits, Evaluation, Trace, TraceStore, fingerprint, mean_of

CFG = (True, False)


def masks(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.3


def evaluation(mask: np.ndarray, grid: tuple[int, ...], index: int = 0, cond: tuple[bool, ...] | None = None) -> Evaluation:
    return Evaluation.of(index, 1.0, 0.5, mask, cond or (True,) * mask.shape[1], grid)


@pytest.mark.parametrize("shape, grid", [((3, 2, 35), (5, 7)), ((1, 1, 1), (1, 1)), ((57, 1, 4096), (64, 64)), ((300, 2, 6), (2, 3))])
def test_bits_come_back(shape: tuple[int, int, int], grid: tuple[int, int]) -> None:
    mask = masks(*shape)
    packed = evaluation(mask, grid)
    assert packed.shape == shape and (packed.mask() == mask).all()
    assert packed.tokens.packed.nbytes == shape[0] * shape[1] * -(-shape[2] // 8)
    assert np.allclose(packed.mean_map(), mask.mean((0, 1)).reshape(grid), atol=1e-3)
    assert packed.computed == pytest.approx(mask.mean())


def test_some_bits_are_unpacked_alone() -> None:
    values = masks(5, 3, 13)
    bits = Bits.of(values)
    assert (bits.values(2) == values[2]).all() and (bits.values(slice(3, 5)) == values[3:]).all()


@pytest.mark.parametrize("cond", [CFG, (False, True), (True, False, False), (True, True), (False,)])
def test_rows_of_a_branch_are_averaged(cond: tuple[bool, ...]) -> None:
    mask, rows = masks(4, len(cond), 12), np.array(cond)
    packed = evaluation(mask, (3, 4), cond=cond)
    of = {name: mask[:, rows == is_cond] for name, is_cond in (("cond", True), ("uncond", False)) if is_cond in cond}
    assert packed.branches == tuple(of)
    for block in range(4):
        each = [rows[block].mean(0).reshape(1, 3, 4) for rows in of.values()]
        for branch, expected in zip(of, each):
            assert np.allclose(packed.map(block, branch), expected)
        assert np.allclose(packed.map(block), np.mean(each, axis=0))
        assert np.allclose(packed.kept[:, block], [one.mean() for one in each])
    for branch, expected in of.items():
        assert np.allclose(packed.map(branch=branch), expected.mean((0, 1)).reshape(1, 3, 4), atol=1e-3)
    assert packed.computed == pytest.approx(np.mean([one.mean() for one in of.values()]))


def test_reference_tokens_are_not_on_the_map() -> None:
    mask = np.zeros((2, 1, 12 + 5), dtype=bool)
    mask[:, :, 12:] = True
    packed = evaluation(mask, (3, 4))
    assert packed.mean_map().max() == packed.map(1).max() == packed.computed == packed.kept.max() == 0.0
    assert (packed.mask() == mask).all()


def test_frames_lie_one_after_another() -> None:
    mask = masks(3, 2, 4 * 6)
    packed = evaluation(mask, (4, 2, 3), cond=CFG)
    assert (packed.frames, packed.grid, packed.maps.shape) == (4, (2, 3), (2, 4, 2, 3))
    trace = Trace("a", {}, (packed,))
    for frame in range(4):
        assert np.allclose(trace.map(0, 1, "uncond", frame), mask[1, 1].reshape(4, 2, 3)[frame])
    assert np.allclose(trace.map(0, 1), mask[1].mean(0).reshape(4, 2, 3).mean(0))
    with pytest.raises(LookupError, match="^There is no frame 4: there are 4, counted from 0.$"):
        trace.map(0, 1, None, 4)


@pytest.mark.parametrize("grid, shown", [((256, 256), (64, 64)), ((65, 64), (64, 64)), ((90, 48), (64, 48)), ((1, 130), (1, 64))])
def test_large_maps_shrink_and_keep_their_mean(grid: tuple[int, int], shown: tuple[int, int]) -> None:
    mask = np.zeros((1, 1, grid[0] * grid[1]), dtype=bool)
    mask.reshape(grid)[: grid[0] // 2 + 1] = True
    packed = evaluation(mask, grid)
    for picture in (packed.mean_map(), packed.map(0)[0]):
        assert picture.shape == shown and max(shown) <= MAP_SIDE
        assert picture[0, 0] == 1.0 and 0.0 <= picture.min() <= picture.max() <= 1.0
        assert mean_of(picture, grid) == pytest.approx(mask.mean(), abs=1e-3) == pytest.approx(packed.computed)


def run_of(steps: int, indices: list[int] | None = None, cond: tuple[bool, ...] = CFG) -> tuple[Trace, np.ndarray]:
    mask = np.stack([masks(3, len(cond), 20, seed=step) for step in range(steps)])
    packed = [evaluation(part, (4, 5), index, cond) for part, index in zip(mask, indices or range(steps))]
    return Trace("a", {}, tuple(packed), ("double 0", "single 0", "single 1")), mask


def test_every_map_of_a_run() -> None:
    trace, mask = run_of(4)
    for step in (None, 0, 3):
        for block in (None, 0, 2):
            for branch, rows in ((None, [0, 1]), ("cond", [0]), ("uncond", [1])):
                part = mask if step is None else mask[[step]]
                part = part if block is None else part[:, [block]]
                expected = part[:, :, rows].mean((0, 1, 2)).reshape(4, 5)
                assert np.allclose(trace.map(step, block, branch), expected, atol=1e-3), (step, block, branch)


def test_what_is_not_there_is_named() -> None:
    trace, _ = run_of(3, indices=[0, 2, 4])
    for asked, said in (((1, 0), "There is no map of step 1: this run has the steps 0 to 4, 3 in all."),
                        ((5, None), "There is no map of step 5: this run has the steps 0 to 4, 3 in all."),
                        ((0, 3), "There is no block 3: this model has the blocks 0 to 2."),
                        ((None, -1), "There is no block -1: this model has the blocks 0 to 2."),
                        ((0, 0, "both"), "There is no such branch here: there is cond and uncond."),
                        ((0, 0, None, -1), "There is no frame -1: there are 1, counted from 0.")):
        with pytest.raises(LookupError) as error:
            trace.map(*asked)
        assert str(error.value) == said
    with pytest.raises(LookupError, match="^There is no map: nothing was recorded in this run.$"):
        Trace("a", {}, ()).map()


def test_a_branch_that_only_some_steps_ran() -> None:
    both, alone = masks(2, 2, 6), masks(2, 1, 6, seed=1)
    trace = Trace("a", {}, (evaluation(both, (2, 3), 0, CFG), evaluation(alone, (2, 3), 1)))
    assert trace.branches == ("cond", "uncond") and np.allclose(trace.map(None, 1, "uncond"), both[1, 1].reshape(2, 3))
    with pytest.raises(LookupError, match="^There is no such branch here: there is cond.$"):
        trace.map(1, 1, "uncond")


def test_steps_of_an_area_alone_are_in_no_mean() -> None:
    whole, area = masks(2, 1, 20), np.ones((2, 1, 6), dtype=bool)
    trace = Trace("a", {}, (evaluation(area, (2, 3), 0), evaluation(whole, (4, 5), 1)))
    assert np.allclose(trace.map(), whole.mean((0, 1)).reshape(4, 5), atol=1e-3)
    assert trace.map(0, 1).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_a_latent_is_known_again(dtype: torch.dtype) -> None:
    latent = torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(0))
    known = fingerprint(latent)
    assert fingerprint(latent.to(dtype)) == known and fingerprint(latent.half()) == known
    assert fingerprint(latent.transpose(2, 3).contiguous().transpose(2, 3)) == known
    assert fingerprint(latent.reshape(1, 4, 8, 6)) != known
    latent[0, 3, 5, 7] += 0.01
    assert fingerprint(latent) != known


def trace(name: str, size: int = 8, config: str = "x", **more: object) -> Trace:
    """`size` × 8 tokens in one block: a byte of bits for each of the `size`, and of its first 64 sixteen bytes of map."""
    return Trace(name, {}, (evaluation(np.zeros((1, 1, 8 * size), dtype=bool), (size, 8)),), config=config, **more)


def test_the_store_keeps_the_last_eight() -> None:
    store = TraceStore()
    for index in range(10):
        store.put(trace(str(index)))
    assert [found.run for found in store.newest_first()] == [str(index) for index in range(9, 1, -1)]
    assert store.get("1") is None and store.get("9").run == "9"
    store.put(trace("5"))
    assert store.newest_first()[0].run == "5" and len(store.newest_first()) == 8


def test_what_nodes_say_without_a_run_takes_no_runs_place() -> None:
    store = TraceStore()
    for index in range(100):
        store.put(trace(f"run {index}"))
        store.put(Trace(f"said {index}", {}, ()))
    kept = [found.run for found in store.newest_first()]
    assert [run for run in kept if run.startswith("run")] == [f"run {index}" for index in range(99, 91, -1)]
    assert len(kept) == 8 + 64 and kept[0] == "said 99"


def test_the_store_is_bounded_over_two_hundred_large_runs() -> None:
    """Each of 17 MB, as 25 steps on a picture of 4096²: three of them fit."""
    store, bits = TraceStore(), Bits(np.zeros((57, 2, 8192), dtype=np.uint8), 65536)
    small = evaluation(np.zeros((57, 2, 8), dtype=bool), (2, 4), cond=CFG)
    large = [Evaluation(index, 1.0, 0.5, CFG, 1, (256, 256), bits, small.kept, small.maps) for index in range(18)]
    assert store.max_bytes == 64 << 20
    for index in range(200):
        store.put(Trace(str(index), {}, tuple(large), config="x"))
        assert len(store.newest_first()) == min(index + 1, 3)
        assert store.nbytes == len(store.newest_first()) * sum(part.nbytes for part in large) <= store.max_bytes
    assert [found.run for found in store.newest_first()] == ["199", "198", "197"]


def test_of_a_run_larger_than_the_store_the_facts_are_kept() -> None:
    store = TraceStore(max_bytes=2500)
    for name in "abc":
        store.put(trace(name, 40))
    assert trace("a", 40).nbytes < 1250 and [found.run for found in store.newest_first()] == ["c", "b", "a"]
    store.put(trace("large", 2500, config="x", fingerprints=("f",)))
    assert [found.run for found in store.newest_first()] == ["large", "c", "b", "a"]
    assert store.find("x", "f").evaluations == () and store.nbytes <= 2500


def test_a_run_is_found_by_settings_and_latent() -> None:
    store = TraceStore()
    for name, config, of in (("a", "x", ("1",)), ("b", "x", ("2", "3")), ("c", "y", ("2",)), ("d", "x", ("1",))):
        store.put(trace(name, config=config, fingerprints=of))
    assert [store.find("x", of).run for of in "123"] == ["d", "b", "b"], "the newest that gave it"
    assert store.find("y", "2").run == "c" and store.find("y", "1") is None and store.find("z", "1") is None
