"""Where ComfyUI looks for our files: `models/dydit`, and the demo model that ships with the pack, with its LoRA."""

from __future__ import annotations

import os

import folder_paths

from ..dydit_core.demo.files import WEIGHTS

ADAPTERS = "dydit"


def register() -> None:
    """Add our folders to the host's; called once when the pack loads."""
    folder_paths.add_model_folder_path(ADAPTERS, os.path.join(folder_paths.models_dir, ADAPTERS), is_default=True)
    for folder in (ADAPTERS, "diffusion_models", "vae", "loras"):
        folder_paths.add_model_folder_path(folder, str(WEIGHTS / folder))
