"""Exo in plain Python: pictures from prompts and pictures, with masks of what was edited.

exo = ExoPipeline.from_pretrained("exo-demo")
prefix = exo.encode_prompt(["a red circle"], size=(128, 128))
made = exo.refine(["make the circle green"], [0], init_images=[picture])
made[0].image, made[0].info.mask_image()
"""

from .inference import ExoT2IInference
from .loading import TrunkOptions
from .pipeline import ExoPipeline, Refined
from .settings import ExoSettings
from .trace import ExoInfo

__all__ = ["ExoInfo", "ExoPipeline", "ExoSettings", "ExoT2IInference", "Refined", "TrunkOptions"]
