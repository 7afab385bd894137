"""`inspect`: what a file holds and which model it fits, from its header alone."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from .adapter import read_facts
from .contents import Contents, contents
from .convert_flux import refusal
from .dit import find_dit
from .files import FileError
from .fit import Layout


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, help="a .safetensors or .pt file")


def run(args: argparse.Namespace) -> None:
    try:
        print("\n".join(describe(args.file)))
    except FileError as error:
        raise SystemExit(str(error)) from None


def describe(path: Path) -> list[str]:
    """Plain lines: what it is, what it fits, what to do with it. Raises FileError."""
    found = contents(path)
    types = Counter(entry.dtype for entry in found.source.entries.values())
    kinds = ", ".join(f"{count} in {dtype}" for dtype, count in types.most_common())
    container = "PyTorch file" if found.pickled else "safetensors"
    head = f"{path.name}: {container}, {path.stat().st_size / 2**20:.1f} MB, {sum(types.values())} tensors ({kinds})"
    return [head, *_REMARKS[found.kind](found)]


def _adapter(found: Contents) -> list[str]:
    facts, sizes = read_facts(found.source.path, dict(found.source.metadata))
    parts = [text for key, text in (("rank", "token scores of rank {rank}"), ("groups", "widths of {groups} channel groups"),
                                    ("experts", "low-rank additions of {experts} experts")) if key in sizes for text in [text.format(**sizes)]]
    budgets = f", at budgets {', '.join(f'{one:g}' for one in facts.budgets)}" if facts.budgets else ""
    return [f'a DyDiT adapter, "{facts.title}": {", ".join(parts)}',
            f"fits a {facts.layout}",
            f"trained with {' and '.join(facts.substitutes) or 'nothing'} in place of what is skipped{budgets}",
            "put it in models/dydit and load it with DyDiT Adapter Loader"]


def _routers(found: Contents) -> list[str]:
    title = found.source.metadata.get("modelspec.title", "")
    return [f'token routers of the DyDiT authors, "{title}"', f"fit a {found.layout}",
            "put it in models/dydit and load it with DyDiT Adapter Loader; prompts of 256 text tokens are what it was trained with"]


def _flux(found: Contents) -> list[str]:
    lines = [f"a {found.layout}{_name(found)}, in {found.naming}",
             "with token routers in it" if found.has_routers else "without token routers"]
    if found.pickled:
        refused = refusal(found.source)
        if refused is not None:
            return [*lines, f"convert does not take it: {refused}"]
        return [*lines, "python -m dydit_core convert FILE FOLDER makes safetensors of it, which ComfyUI should load instead"]
    loader = "DyDiT Checkpoint Loader" if found.has_routers else "Load Diffusion Model"
    return [*lines, f"put it in models/diffusion_models and load it with {loader}"]


def _dit(found: Contents) -> list[str]:
    try:
        dit = find_dit(found.source)
    except FileError as error:
        return ["a DiT, SiT, Latte or DyDiT", str(error)]
    lines = [str(dit), f"predicts {dit.config.prediction}: {dit.known_by}"]
    if found.source.under:
        lines.append(f'its weights are those under "{found.source.under}"')
    if found.pickled:
        return [*lines, "python -m dydit_core convert FILE OUT.safetensors makes a file of it that ComfyUI loads"]
    if dit.routers is not None:
        lines.append("calibrated: any budget holds from the first evaluation on" if dit.calibrated else
                     "not calibrated: at a budget the first evaluation is dense (python -m dydit_core calibrate FILE OUT.safetensors)")
    return [*lines, "put it in models/diffusion_models and load it with DyDiT Checkpoint Loader"]


def _name(found: Contents) -> str:
    """Of the models that everybody has."""
    guided = any("guidance_" in key for key in found.source.entries)
    names = {Layout(3072, 19, 38): "FLUX.1 dev" if guided else "FLUX.1 schnell", Layout(3072, 8, 38): "FLUX.1-lite 8B"}
    return f", as {names[found.layout]}" if found.layout in names else ""


def _lora(found: Contents) -> list[str]:
    flux = any("double_blocks" in key or "single_transformer_blocks" in key or "single_blocks" in key for key in found.source.entries)
    return [f"a LoRA, {'for FLUX' if flux else 'of another model than FLUX'}", "load it with Load LoRA; DyDiT Budget works with it"]


def _vae(found: Contents) -> list[str]:
    return ["a VAE", "put it in models/vae and load it with Load VAE"]


def _unknown(found: Contents) -> list[str]:
    some = ", ".join(list(found.source.entries)[:3])
    routers = "; some are token routers, but no FLUX is beside them" if found.has_routers else ""
    return [f"nothing this knows ({some}, …){routers}"]


_REMARKS: dict[str, Callable[[Contents], list[str]]] = {
    "adapter": _adapter, "routers": _routers, "flux": _flux, "dit": _dit, "lora": _lora, "vae": _vae, "unknown": _unknown,
}
