"""Empty latents of the size and channel count that a model wants."""

from comfy_api.latest import io

from ..flowcore.errors import ConfigError
from .schema import schema

LATENT_SPACES = ("auto", "sd15", "sdxl", "eq-sdxl", "sd3", "flux1", "flux2")


class EmptyLatent(io.ComfyNode):
    """Zeros `b c h w` as the start of text to image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Describe the node."""
        return schema(
            node_id="FlowCoreEmptyLatent",
            display_name="Empty FlowCore Latent",
            category="FlowCore/latent",
            description="An empty latent picture whose channels and size fit a model, a VAE or a named "
            "latent space.",
            search_aliases=["empty latent", "blank latent", "latent size", "width height"],
            inputs=[
                io.Int.Input(
                    "width",
                    default=128,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Width of the picture in pixels.",
                ),
                io.Int.Input(
                    "height",
                    default=128,
                    min=16,
                    max=16384,
                    step=16,
                    tooltip="Height of the picture in pixels.",
                ),
                io.Int.Input(
                    "batch_size",
                    default=1,
                    min=1,
                    max=4096,
                    tooltip="Pictures per run; more need more memory.",
                ),
                io.Combo.Input(
                    "latent_space",
                    options=list(LATENT_SPACES),
                    default="auto",
                    tooltip="Latent space of the picture. 'auto' takes it from the connected model or VAE.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="Model that will be sampled; tells channels and downscale in 'auto'.",
                ),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="VAE that will decode; used in 'auto' when no model is connected.",
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="Zeros, batch x channels x rows x columns.")
            ],
        )

    @classmethod
    def execute(
        cls,
        *,
        width: int,
        height: int,
        batch_size: int,
        latent_space: str = "auto",
        model: io.Model.Type | None = None,
        vae: io.Vae.Type | None = None,
    ) -> io.NodeOutput:
        """Return the zeros. Sizes that are no multiple of the downscale are rounded down."""
        import comfy.model_management
        import torch

        channels, downscale = _grid(latent_space, model, vae)
        shape = (batch_size, channels, max(1, height // downscale), max(1, width // downscale))
        return io.NodeOutput(
            {"samples": torch.zeros(shape, device=comfy.model_management.intermediate_device())}
        )


def _grid(latent_space: str, model: io.Model.Type | None, vae: io.Vae.Type | None) -> tuple[int, int]:
    """Return the channels, and the pixels per latent cell and side.

    Raises: ConfigError if nothing tells them.
    """
    from ..flowcore.vae.latent_spec import LATENT_SPECS

    if latent_space != "auto":
        spec = LATENT_SPECS.get(latent_space)
        if spec is None:
            raise ConfigError(f"latent_space must be one of {', '.join(LATENT_SPACES)}, got {latent_space!r}")
        return spec.channels, spec.downscale
    if model is not None:
        latent_format = model.get_model_object("latent_format")
        return latent_format.latent_channels, getattr(latent_format, "downscale", 8)
    if vae is not None:
        return vae.latent_channels, vae.spacial_compression_encode()
    raise ConfigError(
        "latent_space 'auto' must have a model or a VAE connected, got neither; connect one or name a space"
    )
