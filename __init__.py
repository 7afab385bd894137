"""DyDiT for ComfyUI: a compute budget for diffusion transformers. ComfyUI loads the pack here."""

from .nodes import comfy_entrypoint

WEB_DIRECTORY = "./web"
__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
