"""What all checks are given: the extension as ComfyUI loaded it, and the stand-in files."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_detection
import comfy.utils
import torch


class Context:
    """The extension, and the stand-in files."""

    def __init__(self, extension: ModuleType, base: Path) -> None:
        self.extension = extension
        self.models = base / "models"
        self.detect = comfy.model_detection.detect_unet_config
        self.linear = torch.nn.Linear

    def part(self, name: str) -> Any:
        """Return a module of the extension by its name in it."""
        return importlib.import_module(f"{self.extension.__name__}.{name}")

    def model(self, dtype: str = "default", architecture: str = "xut") -> Any:
        path = self.models / "diffusion_models" / f"standin-{architecture}.safetensors"
        with torch.inference_mode():  # as nodes run
            return self.part("nodes.host.loading").load_model(path, dtype)[0]

    def clip(self, mode: str = "sequence", *names: str, text_for: str = "auto") -> Any:
        paths = [self.models / "text_encoders" / name for name in names or ("standin-text.safetensors",)]
        with torch.inference_mode():
            return self.part("nodes.host.text").load_clip(paths, mode, text_for)

    def vae(self) -> Any:
        with torch.inference_mode():
            return self.part("nodes.host.vae").load_comfy_vae(self.models / "vae" / "standin-vae.safetensors")

    def lora(self, name: str = "lora") -> dict[str, torch.Tensor]:
        return comfy.utils.load_torch_file(
            str(self.models / "loras" / f"standin-{name}.safetensors"), safe_load=True
        )
