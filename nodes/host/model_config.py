"""What ComfyUI asks of a model family: dtypes, sampling defaults, latent format, how it is saved."""

import json
from typing import Any

import comfy.supported_models_base
import torch
from torch import Tensor

from ...flowcore.models import Architecture
from ...flowcore.shifts import SHIFT
from .hosts import HOSTS, Host, shifted
from .latent_formats import FlowCoreLatentFormat, SequenceFormat
from .model import FlowCoreModel

METADATA_TENSOR = "flowcore_metadata"
_LEAST_MEMORY = 0.25


class FlowCoreConfig(comfy.supported_models_base.BASE):
    """The model config of one loaded file. ComfyUI expands `unet_config` into the network's constructor."""

    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 - ComfyUI's contract: class attributes
    supported_inference_dtypes = [torch.bfloat16, torch.float16, torch.float32]  # noqa: RUF012
    vae_key_prefix = ["vae."]  # noqa: RUF012
    text_encoder_key_prefix = ["text_encoders."]  # noqa: RUF012

    def __init__(
        self,
        architecture: Architecture,
        config: Any,  # noqa: ANN401 - each architecture's own
        latent_format: FlowCoreLatentFormat | SequenceFormat,
        shift: float | None = None,
        host: Host | None = None,
    ) -> None:
        """Take the architecture and its settings, and what the file states.

        shift: None = the architecture's. host: None = that of the architecture's pictures.
        """
        self.host = host or HOSTS[architecture.name]
        super().__init__(
            {
                "image_model": f"flowcore_{architecture.name}",
                "architecture": architecture,
                "host": self.host,
                "config": config,
                **self.host.unet_config(config),
            }
        )
        self.latent_format = latent_format
        self.shift = shift
        self.sampling, self.sampling_settings = (
            self.host.sampling(config) if shift is None else shifted(shift)
        )
        self.memory_usage_factor = max(_LEAST_MEMORY, self.host.memory(config))

    def inpaint_model(self) -> bool:
        """Return False: an adapter whose model takes a mask gives it by itself."""
        return False

    def get_model(
        self,
        state_dict: dict[str, Tensor],  # noqa: ARG002 - ComfyUI's signature
        prefix: str = "",  # noqa: ARG002
        device: torch.device | None = None,
    ) -> FlowCoreModel:
        """Return the model without weights."""
        return self.host.model(self, self.sampling, device=device)

    def clip_target(self, state_dict: dict[str, Tensor] | None = None) -> None:
        """Return nothing: text encoders have their own loader."""

    def process_unet_state_dict_for_saving(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors under ComfyUI's prefix, and what shapes do not tell as one tensor of bytes.

        ModelSave drops the metadata of the file; the tensor survives it.
        """
        metadata = {
            "flowcore.arch": self.unet_config["architecture"].name,
            "flowcore.config": json.dumps(self.unet_config["config"].to_dict()),
            **({} if self.shift is None else {SHIFT: str(self.shift)}),
            **self.latent_format.metadata(),
        }
        packed = torch.frombuffer(bytearray(json.dumps(metadata).encode()), dtype=torch.uint8)
        return super().process_unet_state_dict_for_saving({**state_dict, METADATA_TENSOR: packed})
