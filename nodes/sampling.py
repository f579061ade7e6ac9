"""Exact sigma schedules for the stock custom samplers."""

from comfy_api.latest import io

from ..flowcore.errors import ConfigError
from .schema import schema

SHIFTS = ("value", "flux1", "flux2")


class Sigmas(io.ComfyNode):
    """A shifted uniform grid, computed rather than picked from a table."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FlowCoreSigmas",
            display_name="FlowCore Sigmas",
            category="FlowCore/sampling",
            description="Noise levels from 1 to 0 in equal steps, shifted; exact where stock schedulers "
            "pick from a table.",
            search_aliases=["flow scheduler", "sigma schedule", "shift", "timesteps"],
            inputs=[
                io.Int.Input(
                    "steps",
                    default=20,
                    min=1,
                    max=10000,
                    tooltip="Number of sampling steps; more is slower and finer.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Part of the way to run, 0 to 1. Below 1 the source picture stays visible; 0 "
                    "runs no step.",
                ),
                io.Combo.Input(
                    "shift_by",
                    options=list(SHIFTS),
                    default="value",
                    tooltip="'value' uses the shift below; 'flux1' and 'flux2' compute it from the picture "
                    "size.",
                ),
                io.Float.Input(
                    "shift",
                    default=1.0,
                    min=0.01,
                    max=100.0,
                    step=0.01,
                    tooltip="Above 1 spends more steps at high noise (large pictures); 1 is even. Only for "
                    "'value'.",
                ),
                io.Latent.Input(
                    "latent_image",
                    optional=True,
                    tooltip="Latent to be sampled; its size is needed by flux1 and flux2.",
                ),
            ],
            outputs=[
                io.Sigmas.Output(
                    display_name="sigmas", tooltip="Noise levels, steps + 1 values, the last one 0."
                )
            ],
        )

    @classmethod
    def execute(
        cls,
        *,
        steps: int,
        denoise: float,
        shift_by: str,
        shift: float,
        latent_image: io.Latent.Type | None = None,
    ) -> io.NodeOutput:
        """Return the grid as float32; no value at all for denoise 0, as stock schedulers do."""
        import torch

        from ..flowcore.flow.schedule import sigma_grid

        if denoise <= 0:
            return io.NodeOutput(torch.zeros(0))
        grid = sigma_grid(steps, _shift(shift_by, shift, steps, latent_image), strength=denoise)
        return io.NodeOutput(grid.float())


def _shift(shift_by: str, shift: float, steps: int, latent_image: io.Latent.Type | None) -> float:
    """Return the multiplicative shift that the inputs ask for.

    Raises: ConfigError if the choice is unknown, or needs a latent that is not connected.
    """
    import math

    from ..flowcore.flow.schedule import flux1_mu, flux2_mu

    if shift_by == "value":
        return shift
    if shift_by not in SHIFTS:
        raise ConfigError(f"shift_by must be one of {', '.join(SHIFTS)}, got {shift_by!r}")
    if latent_image is None:
        raise ConfigError(f"latent_image must be connected for shift_by {shift_by!r}, got none")
    _, channels, rows, columns = latent_image["samples"].shape
    side = 1 if channels == 128 else 2  # FLUX.2 latents come patchified; FLUX.1 takes 2 x 2 cells a token
    tokens = (rows // side) * (columns // side)
    return math.exp(flux1_mu(tokens) if shift_by == "flux1" else flux2_mu(tokens, steps))
