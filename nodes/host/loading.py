"""A diffusion model file to ComfyUI's MODEL, through flowcore's own strict loading."""

import logging
from collections.abc import Callable
from pathlib import Path

import comfy.model_management as mm
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...flowcore.errors import CheckpointError, ConfigError
from ...flowcore.flux import Space, SpacePair
from ...flowcore.flux.space import METADATA_KEY
from ...flowcore.shifts import stated_shift
from ...flowcore.vae.latent_spec import LatentSpec
from ...flowcore.weights.checkpoint import LoadedModel
from ...flowcore.weights.checkpoint import load_model as read_model
from .hosts import HOSTS, SEQUENCES
from .latent_formats import SequenceFormat, format_of
from .model_config import FlowCoreConfig

logger = logging.getLogger("flowcore")
_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp8_e4m3fn": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def load_model(path: Path, weight_dtype: str) -> tuple[ModelPatcher, str]:
    """Return the model of pictures of a file, and a line about it.

    Raises: CheckpointError or ConfigError, naming the file or the setting.
    """
    return _load(path, weight_dtype, _picture_config)


def load_sequences(path: Path, weight_dtype: str) -> tuple[ModelPatcher, str]:
    """Return the Flux between sequences of a file, and a line about it.

    Raises: CheckpointError or ConfigError, naming the file or the setting.
    """
    return _load(path, weight_dtype, _sequence_config)


def _load(
    path: Path, weight_dtype: str, make_config: Callable[[LoadedModel, str], tuple[FlowCoreConfig, str]]
) -> tuple[ModelPatcher, str]:
    """Return the model of a file, and a line about it.

    make_config: (file, its name) -> ComfyUI's configuration, and what the line says of text and latents.
    """
    if weight_dtype != "default" and weight_dtype not in _DTYPES:
        raise ConfigError(
            f"weight_dtype must be default or one of {', '.join(_DTYPES)}, got {weight_dtype!r}"
        )
    with torch.inference_mode(False):
        loaded = read_model(path)  # nothing is copied: the tensors lie in the mapped file
        model_config, facts = make_config(loaded, path.name)
        state = loaded.model.state_dict()
        parameters = comfy.utils.calculate_parameters(state)
        dtype = _choose_dtype(model_config, state, parameters, weight_dtype)
        patcher = _build(model_config, state, mm.unet_inital_load_device(parameters, dtype))
    kind = str(dtype).removeprefix("torch.")
    return (
        patcher,
        f"{loaded.architecture.name}: {parameters / 1e6:.1f} million parameters in {kind}; {facts}",
    )


def _picture_config(loaded: LoadedModel, source: str) -> tuple[FlowCoreConfig, str]:
    """Return the configuration of a model of pictures, and what a user wants to know of text and latents."""
    _check_architecture(loaded.architecture.name, source)
    latent_format = format_of(loaded.metadata, loaded.architecture.latent_spec, source)
    spec, text = latent_format.spec, loaded.architecture.text_shape(loaded.config)
    _check_channels(spec, loaded.architecture.latent_channels(loaded.config), source)
    shift = stated_shift(loaded.metadata, source)
    facts = (
        f"text states {'none' if text.width is None else f'{text.width} wide'}"
        f"{'' if text.pooled is None else f', pooled vector {text.pooled} wide'}; "
        f"latents {spec.name}, {spec.channels} channels, 1/{spec.downscale}"
    )
    return FlowCoreConfig(loaded.architecture, loaded.config, latent_format, shift), facts


def _sequence_config(loaded: LoadedModel, source: str) -> tuple[FlowCoreConfig, str]:
    """Return the configuration of a Flux between sequences, and what a user wants to know of its spaces."""
    name = loaded.architecture.name
    if name != "flux" or METADATA_KEY not in loaded.metadata:
        raise CheckpointError(
            f"{source} must be a flux model that states its spaces, got {name} without; make one with python "
            "-m training.sequences curves, or load a model of pictures with Load FlowCore Model"
        )
    spaces = SpacePair.from_metadata(loaded.metadata)
    shift = stated_shift(loaded.metadata, source)
    facts = f"from {_space_facts(spaces.condition)} to {_space_facts(spaces.data)}"
    latent_format = SequenceFormat(spaces)
    return FlowCoreConfig(loaded.architecture, loaded.config, latent_format, shift, SEQUENCES), facts


def _space_facts(space: Space) -> str:
    codec = space.codec
    return f"{codec.kind} ({codec.positions().shape[1]} tokens of {codec.channels} channels)"


def _check_architecture(name: str, source: str) -> None:
    """Refuse an architecture that has no network for ComfyUI. Raises: ConfigError."""
    if name not in HOSTS:
        raise ConfigError(
            f"{source} must be a model of {', '.join(HOSTS)} for this node, got {name}, which runs in "
            "plain Python only"
        )


def _check_channels(spec: LatentSpec, channels: int, source: str) -> None:
    """Refuse a latent space that is not the model's, and a model of no latents. Raises: CheckpointError."""
    if channels < 1:
        raise CheckpointError(
            f"the model of {source} must make latents of pictures, got one of other sequences; load it with "
            "Load Flux Sequences"
        )
    if spec.channels != channels:
        raise CheckpointError(
            f"the latent space of {source} must have the model's {channels} channels, got {spec.name} with "
            f"{spec.channels}; write flowcore.latents_mean and flowcore.latents_std into its metadata"
        )


def _choose_dtype(
    model_config: FlowCoreConfig, state: dict[str, Tensor], parameters: int, weight_dtype: str
) -> torch.dtype:
    """Return the dtype of the weights, and tell the config which one ComfyUI computes in."""
    dtypes = list(model_config.supported_inference_dtypes)
    dtype = _DTYPES.get(weight_dtype)
    if dtype is None:
        stored = comfy.utils.weight_dtype(state)
        dtype = mm.unet_dtype(model_params=parameters, supported_dtypes=dtypes, weight_dtype=stored)
    model_config.set_inference_dtype(dtype, mm.unet_manual_cast(dtype, mm.get_torch_device(), dtypes))
    return dtype


def _build(model_config: FlowCoreConfig, state: dict[str, Tensor], device: torch.device) -> ModelPatcher:
    """Return the model with copies of the weights: the file may be replaced while they are in use.

    The network says which of its tensors stay in float32 whatever the dtype.
    """
    model = model_config.get_model(state, "", device=torch.device("meta"))
    network = model.diffusion_model
    matrices = {f"{name}.weight" for name, layer in network.named_modules() if hasattr(layer, "in_features")}

    def target(name: str, built: Tensor) -> torch.dtype:
        # Eight bits are for matrices; biases are small and would lose too much.
        is_spared = built.dtype in _FP8 and name not in matrices
        return model_config.manual_cast_dtype or torch.float32 if is_spared else built.dtype

    copies = {
        name: state[name].to(device=device, dtype=target(name, built), copy=True)
        for name, built in network.state_dict().items()
    }
    network.load_state_dict(copies, strict=True, assign=True)
    network.requires_grad_(False)
    model.device = device
    return ModelPatcher(model, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device())
