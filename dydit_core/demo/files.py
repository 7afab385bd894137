"""Where the demo's finished files are."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
BASE_FILE = Path("diffusion_models/dydit_demo.safetensors")
VAE_FILE = Path("vae/dydit_demo_vae.safetensors")
CHECKER_FILE = Path("checker.safetensors")
TWIN_FILE = Path("loras/dydit_demo_4step.safetensors")


def adapter_file(kind: str) -> Path:
    """Of the adapter of this `kind` (see `adapter.kinds`), or of the small Latte's: latte."""
    return Path(f"dydit/dydit_demo_{kind}.safetensors")


ADAPTER_FILE = adapter_file("sdt")
CLASS_VAE_FILE = Path("vae/dydit_demo_classes_vae.safetensors")


def class_file(name: str) -> Path:
    """Of the class-conditional demo model that is a `name`: dit, sit or latte."""
    return Path(f"diffusion_models/dydit_demo_{name}.safetensors")


LATTE_FILE, LATTE_ADAPTER_FILE = class_file("latte"), adapter_file("latte")
