"""Where the demo's finished files are."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
BASE_FILE = Path("diffusion_models/dydit_demo.safetensors")
VAE_FILE = Path("vae/dydit_demo_vae.safetensors")
CHECKER_FILE = Path("checker.safetensors")
ADAPTER_FILE = Path("dydit/dydit_demo_sdt.safetensors")
