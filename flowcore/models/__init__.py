"""The architectures, a row each in `ARCHITECTURES`, and `detect`, which finds the row of a file."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from ..conditioning import Conditioning, TextShape, zeroed
from ..errors import CheckpointError
from . import exo, flux, single_stream, tinyflux, xut
from .flux.layouts import diffusers_config, from_diffusers, from_scaled, is_diffusers, is_scaled, to_diffusers
from .flux.lora import diffusers_names, lora_names
from .tinyflux import layouts as tinyflux_layouts
from .tinyflux.lora import native_to_standard, standard_to_native
from .xut.jax_port import JAX_SETTINGS, is_jax, jax_to_reference

LayerNames: TypeAlias = Mapping[str, tuple[str, tuple[slice, ...]]]
"""Foreign name of a layer -> the layer's own name, and its rows in the foreign order; no rows = all."""
NameLayers: TypeAlias = Callable[[Mapping[str, Sequence[int]]], LayerNames]
"""Weight shapes by the layers' own names -> foreign names."""


def no_names(shapes: Mapping[str, Sequence[int]]) -> LayerNames:  # noqa: ARG001 - as `NameLayers`
    """Return no foreign names: files call the layers as the model does."""
    return {}


ConvertLora: TypeAlias = Callable[[Mapping[str, Tensor], Mapping[str, str]], Mapping[str, Tensor]]


def as_is(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Mapping[str, Tensor]:  # noqa: ARG001
    """Return the tensors: `Architecture.convert_lora` where files have no form of their own."""
    return tensors


def unchanged(conditioning: Conditioning) -> Conditioning:
    """Return the conditioning: `Architecture.null_text` where the empty text itself stands for none."""
    return conditioning


def only_version(keys: Collection[str]) -> str:  # noqa: ARG001 - as `Architecture.version`
    """Return no version: there is one alone."""
    return ""


class ModelConfig(Protocol):
    """What every architecture's configuration offers besides its fields."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON-like values."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """A foreign naming of an architecture's tensors; settings are configuration fields that it implies.

    export: (tensors by the original names, configuration) -> tensors in this layout; None = only read.
    folder_settings: configuration -> the config.json of a folder in this layout; None = it has no folders.
    """

    name: str
    is_match: Callable[[Collection[str]], bool]
    convert: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    export: Callable[[Mapping[str, Tensor], Any], dict[str, Tensor]] | None = None
    folder_settings: Callable[[Any], dict[str, Any]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One architecture: how to recognise, build, and call its models.

    Attributes:
        name: as in metadata and training configurations.
        model: (config, *, ops, device, dtype) -> module.
        presets: named configurations.
        config_from_dict: JSON-like fields -> configuration.
        infer_config: (tensors by bare names, metadata) -> configuration.
        is_match: whether bare names are this architecture's.
        velocity: (forward, latents, sigma, conditioning, **options) -> velocity.
        latent_channels: configuration -> channels of its latents.
        text_shape: configuration -> what its models read of a text.
        null_text: the encoded empty text -> the condition of models told nothing, in training with dropped
            captions and in guidance without a negative prompt.
        size_extras: (configuration, width, height of the image) -> the `Conditioning.extras` that follow from
            the size alone, batch 1.
        latent_spec: name of the latent space where a file states none.
        fresh: further arguments of `model` for weights that are to be trained from scratch.
        prefixes: what files put before the bare names.
        version: bare names as in a file -> version of the architecture, "" where there is one alone.
        layouts: foreign namings that are converted on loading.
        lora_names: every foreign name by which LoRA files call a layer.
        diffusers_names: those of them that LoRA files in the layout of diffusers have.
        convert_lora: (tensors, metadata) of a LoRA file in a form of its own -> under usual keys.
        export_lora: tensors under this project's keys -> tensors and metadata in that form, if there is one.
    """

    name: str
    model: Callable[..., nn.Module]
    presets: Mapping[str, Any]
    config_from_dict: Callable[[Mapping[str, Any]], Any]
    infer_config: Callable[[Mapping[str, Tensor], Mapping[str, str] | None], Any]
    is_match: Callable[[Collection[str]], bool]
    velocity: Callable[..., Tensor]
    latent_channels: Callable[[Any], int]
    text_shape: Callable[[Any], TextShape]
    size_extras: Callable[[Any, int, int], dict[str, Tensor]]
    latent_spec: str
    prefixes: tuple[str, ...]
    null_text: Callable[[Conditioning], Conditioning] = unchanged
    fresh: Mapping[str, Any] = field(default_factory=dict)
    version: Callable[[Collection[str]], str] = only_version
    layouts: tuple[Layout, ...] = ()
    lora_names: NameLayers = no_names
    diffusers_names: NameLayers = no_names
    convert_lora: ConvertLora = as_is
    export_lora: Callable[[Mapping[str, Tensor]], tuple[dict[str, Tensor], dict[str, str]]] | None = None


_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "module.",
    "_orig_mod.",
    "transformer.",
    "model.",
    "",
)
"""What ComfyUI, diffusers, and torch's compile and parallel wrappers put before the bare names."""

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        name="xut",
        model=xut.XUDiT,
        presets=xut.PRESETS,
        config_from_dict=xut.XUTConfig.from_dict,
        infer_config=xut.infer_config,
        is_match=xut.is_match,
        velocity=xut.velocity,
        latent_channels=lambda config: config.input_dim,
        text_shape=lambda config: TextShape(width=config.ctx_dim, length=config.ctx_size),
        size_extras=xut.size_extras,
        latent_spec="eq-sdxl",
        prefixes=("model.diffusion_model.", "diffusion_model.", "unet.model.", "transformer.", "model.", ""),
        layouts=(Layout(name="jax", is_match=is_jax, convert=jax_to_reference, settings=JAX_SETTINGS),),
    ),
    Architecture(
        name="flux",
        model=flux.Flux,
        presets=flux.PRESETS,
        config_from_dict=flux.FluxConfig.from_dict,
        infer_config=flux.infer_config,
        is_match=flux.is_match,
        velocity=flux.velocity,
        latent_channels=lambda config: config.out_channels // flux.PATCH_SIZE**2,
        text_shape=lambda config: TextShape(
            width=config.context_in_dim,
            length=flux.TEXT_LENGTH if config.guidance_embed else flux.TEXT_LENGTH // 2,
            pooled=config.vec_in_dim,
            needs_pooled=config.needs_y,
            masks_padding=False,
        ),
        fresh={"init": "zero"},
        size_extras=flux.default_extras,
        latent_spec="flux1",
        prefixes=_PREFIXES,
        layouts=(
            Layout(name="scaled_fp8", is_match=is_scaled, convert=from_scaled),
            Layout(
                name="diffusers",
                is_match=is_diffusers,
                convert=from_diffusers,
                export=to_diffusers,
                folder_settings=diffusers_config,
            ),
        ),
        lora_names=lora_names,
        diffusers_names=diffusers_names,
    ),
    Architecture(
        name="tinyflux",
        model=tinyflux.TinyFlux,
        presets=tinyflux.PRESETS,
        config_from_dict=tinyflux.TinyFluxConfig.from_dict,
        infer_config=tinyflux.infer_config,
        is_match=tinyflux.is_match,
        velocity=tinyflux.velocity,
        latent_channels=lambda config: config.in_channels,
        text_shape=lambda config: TextShape(
            width=config.joint_attention_dim,
            length=tinyflux.TEXT_LENGTH,
            pooled=config.pooled_projection_dim,
            needs_pooled=not config.pooled_from_text,
        ),
        null_text=zeroed,
        size_extras=lambda config, width, height: {},  # noqa: ARG005 - the model reads the size off the latents
        latent_spec="flux1-unshifted",
        prefixes=_PREFIXES,
        version=tinyflux_layouts.version,
        layouts=(
            Layout(
                name="v3",
                is_match=tinyflux_layouts.is_version_3,
                convert=tinyflux_layouts.version_3_to_current,
                export=tinyflux_layouts.current_to_version_3,
            ),
            Layout(
                name="v4.1",
                is_match=tinyflux_layouts.has_idle,
                convert=tinyflux_layouts.without_idle,
                export=tinyflux_layouts.with_qk_scale,
            ),
        ),
        convert_lora=native_to_standard,
        export_lora=standard_to_native,
    ),
    Architecture(
        name="single_stream",
        model=single_stream.SingleStreamDiT,
        presets=single_stream.PRESETS,
        config_from_dict=single_stream.SingleStreamConfig.from_dict,
        infer_config=single_stream.infer_config,
        is_match=single_stream.is_match,
        velocity=single_stream.velocity,
        latent_channels=lambda config: config.in_channels,
        text_shape=lambda config: TextShape(width=config.text_embed_dim, length=config.max_token_length),
        null_text=zeroed,
        size_extras=lambda config, width, height: {},  # noqa: ARG005 - the model reads the size off the latents
        latent_spec="flux1-unshifted",
        prefixes=_PREFIXES,
        version=single_stream.version,
    ),
    # Its context holds token ids, a number for each token; files without a trunk name one, which weights.exo
    # attaches.
    Architecture(
        name="exo",
        model=exo.Exo,
        presets=exo.PRESETS,
        config_from_dict=exo.ExoConfig.from_dict,
        infer_config=exo.infer_config,
        is_match=exo.is_match,
        velocity=exo.velocity,
        latent_channels=lambda config: config.latent_channels,
        text_shape=lambda config: TextShape(width=1, length=config.max_tokens),
        size_extras=lambda config, width, height: {},  # noqa: ARG005 - the model reads the size off the latents
        latent_spec="flux2",
        prefixes=_PREFIXES,
    ),
)


def find_architecture(name: str) -> Architecture:
    """Return the row of a name. Raises: CheckpointError that lists the names there are."""
    for architecture in ARCHITECTURES:
        if architecture.name == name:
            return architecture
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise CheckpointError(f"the architecture must be one of {known}, got {name!r}")


def detect(keys: Collection[str]) -> tuple[Architecture, str]:
    """Return the architecture that the tensor names belong to, and the prefix before its bare names.

    Raises: CheckpointError that says what was found instead.
    """
    for architecture in ARCHITECTURES:
        for prefix in sorted(architecture.prefixes, key=len, reverse=True):
            bare = {key[len(prefix) :] for key in keys if key.startswith(prefix)}
            if architecture.is_match(bare) or find_layout(architecture, bare) is not None:
                return architecture, prefix
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise CheckpointError(f"the tensors must be those of a {known} model, got {_describe(keys)}")


def find_layout(architecture: Architecture, bare: Collection[str]) -> Layout | None:
    """Return the foreign layout that the bare names are in, or None."""
    return next((layout for layout in architecture.layouts if layout.is_match(bare)), None)


def _describe(keys: Collection[str]) -> str:
    """Return what the names look like, for a message."""
    if not keys:
        return "no tensor at all"
    if any(".lora_" in key or ".lokr_" in key or ".hada_" in key for key in keys):
        return f"{len(keys)} tensors of an adapter such as {min(keys)}; load it as a LoRA on top of a model"
    parts = {"encoder.conv_in.weight": "a VAE", "embed_tokens.weight": "a text encoder"}
    for name, what in parts.items():
        if any(key.endswith(name) for key in keys):
            return f"{len(keys)} tensors of {what}; give the file of the diffusion model"
    return f"{len(keys)} others such as {', '.join(sorted(keys)[:3])}"
