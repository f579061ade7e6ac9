"""Exo under the names of its description: a picture in one call."""

from pathlib import Path
from typing import Any

import torch
from PIL import Image

from .pipeline import ExoPipeline
from .settings import ExoSettings
from .trace import ExoInfo

DEMO = "exo-demo"
"""Bundled name of the demo model."""


class ExoT2IInference:
    """A model that makes and edits pictures, one a call."""

    def __init__(
        self,
        model_path: str | Path | None = None,
        *,
        trunk: str | Path | None = None,
        device: str = "auto",
        dtype: str = "auto",
    ) -> None:
        """Load a model; None = the bundled demo. The rest is as in `ExoPipeline.from_pretrained`."""
        path = DEMO if model_path is None else model_path
        self.pipeline = ExoPipeline.from_pretrained(path, trunk, device=device, dtype=dtype)

    def generate(
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        **settings: Any,
    ) -> Image.Image:
        """Return the picture alone; settings are those of `generate_with_info`."""
        return self.generate_with_info(prompt, height, width, **settings)[0]

    def generate_with_info(  # noqa: PLR0913 - the one call that spells out every setting
        self,
        prompt: str,
        height: int | None = None,
        width: int | None = None,
        *,
        steps: int = 20,
        refine_iters: int = 4,
        guidance_scale: float = 4.0,
        negative_prompt: str = "",
        init_image: Image.Image | None = None,
        strength: float = 1.0,
        preserve: float = 0.0,
        eta: float = 0.0,
        rewrite: bool = True,
        seed: int | None = None,
    ) -> tuple[Image.Image, ExoInfo]:
        """Return a picture, and its masks, timings and seed.

        Args:
            prompt: what to show, or how to change the initial image.
            height: pixels; None = the initial image's, else the model's own, else 1024.
            width: as height.
            steps: of the solver.
            refine_iters: refinements in each step, 1 to 8.
            guidance_scale: 1 = none.
            negative_prompt: what guidance leads away from.
            init_image: what the model looks at.
            strength: below 1 the run starts from the initial image, taken back to noise by this much.
            preserve: share in [0, 1] by which cells that no mask marks stay as they were.
            eta: share in [0, 1] of new noise in each step.
            rewrite: whether a model that can do so rewrites what is asked of the initial image.
            seed: start of the noise, drawn on the CPU; None = another one each time.

        Raises: ConfigError, on one line, naming the argument.
        """
        settings = ExoSettings(
            height=height,
            width=width,
            num_steps=steps,
            iterations=refine_iters,
            cfg_scale=guidance_scale,
            negative_prompt=negative_prompt,
            strength=strength,
            preserve=preserve,
            eta=eta,
            rewrite=rewrite,
        )
        number = torch.Generator().seed() if seed is None else seed
        images = None if init_image is None else [init_image]
        made = self.pipeline.refine([prompt], [number], settings, init_images=images)[0]
        return made.image, made.info
