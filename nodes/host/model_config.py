"""What ComfyUI asks of a model family: dtypes, sampling defaults, latent format, how it is saved."""

import json
from typing import Any

import comfy.model_base
import comfy.supported_models_base
import torch
from torch import Tensor

from .latent_formats import FlowCoreLatentFormat, metadata_of
from .model import FlowCoreModel, XutNetwork

METADATA_TENSOR = "flowcore_metadata"
_REFERENCE_WIDTH = 1024
_REFERENCE_MEMORY = 2.0


class FlowCoreConfig(comfy.supported_models_base.BASE):
    """The model config of one loaded file. ComfyUI expands `unet_config` into the network's constructor."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 - ComfyUI's contract: class attributes
    sampling_settings: dict[str, Any] = {"shift": 1.0, "multiplier": 1.0}  # noqa: RUF012
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012
    vae_key_prefix = ["vae."]  # noqa: RUF012
    text_encoder_key_prefix = ["text_encoders."]  # noqa: RUF012

    def __init__(self, architecture: str, config: Any, latent_format: FlowCoreLatentFormat) -> None:  # noqa: ANN401
        """Take the architecture's name and settings, and the latent space of the file."""
        super().__init__({"image_model": f"flowcore_{architecture}", "config": config})
        self.architecture = architecture
        self.latent_format = latent_format
        # Activations grow with the width; the reference is what the published XUT extension declares.
        self.memory_usage_factor = max(0.25, _REFERENCE_MEMORY * config.dim / _REFERENCE_WIDTH)

    def inpaint_model(self) -> bool:
        """Return False: no architecture takes the mask as extra channels."""
        return False

    def model_type(self, state_dict: dict[str, Tensor], prefix: str = "") -> comfy.model_base.ModelType:  # noqa: ARG002
        """Return straight paths with velocity prediction."""
        return comfy.model_base.ModelType.FLOW

    def get_model(
        self,
        state_dict: dict[str, Tensor],  # noqa: ARG002 - ComfyUI's signature
        prefix: str = "",  # noqa: ARG002
        device: torch.device | None = None,
    ) -> FlowCoreModel:
        """Return the model without weights."""
        return FlowCoreModel(self, network=XutNetwork, device=device)

    def clip_target(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """Return nothing: text encoders have their own loader."""

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under ComfyUI's prefix, and what shapes do not tell as one tensor of bytes.

        ModelSave drops the metadata of the file; the tensor survives it.
        """
        metadata = {
            "flowcore.arch": self.architecture,
            "flowcore.config": json.dumps(self.unet_config["config"].to_dict()),
            **metadata_of(self.latent_format),
        }
        packed = torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8)
        return super().process_unet_state_dict_for_saving({**state_dict, METADATA_TENSOR: packed})
