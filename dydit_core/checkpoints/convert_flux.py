"""A released DyDiT FLUX, in diffusers' layout, as the two files that ComfyUI loads: the base in BFL's layout, and its routers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from torch import Tensor

from .files import FileError, bad
from .fit import Fit, Sketch, sketch_of
from .flux_keys import ROUTER, SWAPPED, Sizes, base_keys, read_sizes, router_keys, router_shapes, source_shapes
from .outputs import Output
from .routers import metadata
from .source import AGAIN, Entry, Source, check_entries
from .stream import Plan


def flux_outputs(source: Source, folder: Path) -> tuple[Output, Output]:
    """The base and the routers of `source`, everything about its keys checked. Raises FileError."""
    if folder.suffix == ".safetensors":
        raise bad(source.path, f"becomes two files, and {folder.name} is one", "name a folder for them")
    sizes = read_layout(source)
    fused, theirs = base_keys(sizes), router_keys(sizes.layout, diffusers=True)
    base, routers = _plans(source, sizes, fused, theirs)
    name = source.path.stem
    return (Output(folder / f"{name}_base.safetensors", base,
                   _unswapped(source.tensors(key for parts in fused.values() for key in parts))),
            Output(folder / f"{name}_routers.safetensors", routers, source.tensors(theirs.values())))


def read_layout(source: Source) -> Sizes:
    """Sizes of the model, everything about its keys checked. Raises FileError."""
    path, entries = source.path, source.entries
    if "img_in.weight" in entries:
        raise bad(path, "is in ComfyUI's layout already",
                  "load it with DyDiT Checkpoint Loader if it has routers, else with Load Diffusion Model")
    sizes = read_sizes({key: entry.shape for key, entry in entries.items()})
    if isinstance(sizes, str):
        raise bad(path, f"is neither a FLUX in diffusers' layout (it lacks a tensor {sizes} of a fitting size) nor a DiT",
                  "choose a released transformer, for example transformer_230000.pt or new_dydit0.5.pt")
    if not any(f".{ROUTER}." in key for key in entries):
        raise bad(path, "is a FLUX without token routers", "load it with Load Diffusion Model, which reads diffusers' layout too")
    base, theirs = source_shapes(sizes), router_keys(sizes.layout, diffusers=True)
    routers = dict(zip(theirs.values(), router_shapes(sizes.layout).values()))
    check_entries(source, base, "tensors of the base")
    check_entries(source, routers, "routers")
    extra = sorted(set(entries) - set(base) - set(routers))
    if extra:
        raise bad(path, f"has a tensor {extra[0][:80]} that no DyDiT FLUX file has", AGAIN)
    return sizes


def refusal(source: Source) -> str | None:
    """Why `convert` would not take this FLUX, from its header, or None."""
    try:
        read_layout(source)
    except FileError as error:
        return str(error)
    return None


def _plans(source: Source, sizes: Sizes, fused: dict[str, tuple[str, ...]], theirs: dict[str, str]) -> tuple[Plan, Plan]:
    """The base and the router file, before they are written."""
    def joined(key: str, parts: tuple[str, ...]) -> Entry:
        first = source.entries[parts[0]]
        rows = sum(source.entries[part].shape[0] for part in parts)
        return Entry(key, first.dtype, (rows, *first.shape[1:]))

    base = [joined(key, parts) for key, parts in fused.items()]
    routers = [Entry(ours, source.entries[key].dtype, source.entries[key].shape) for ours, key in theirs.items()]
    title = f"Token routers of {source.path.stem}"
    fit = Fit(title, sizes.layout, _sketch(source, sizes, fused))
    words = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.architecture": "flux-1",
             "modelspec.title": f"Base of {source.path.stem}"}
    return Plan(base, words), Plan(routers, metadata(fit, routers[0].dtype))


def _sketch(source: Source, sizes: Sizes, fused: dict[str, tuple[str, ...]]) -> Sketch:
    def find(name: str) -> Tensor:
        key = name if name.endswith(".bias") else f"{name}.scale"
        return next(tensor for _, tensor in source.tensors(fused[key]))

    return sketch_of(find, sizes.layout.double, sizes.layout.single)


def _unswapped(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """diffusers' final modulation is (scale, shift), BFL's (shift, scale)."""
    for key, tensor in tensors:
        if key.startswith(SWAPPED):
            scale, shift = tensor.chunk(2)
            yield key, shift
            yield key, scale
        else:
            yield key, tensor
