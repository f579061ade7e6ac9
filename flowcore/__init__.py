"""FlowCore: flow-matching image models for plain Python, for training, and as native ComfyUI nodes.

Dimensions, the same letters in every shape of the package:
`b` batch, `c` latent channels, `h w` latent rows and columns, `p` patch side, `n` image tokens, `m` context
tokens, `l` = m + n, `d` width, `nh` heads, `e` head width, `f` MLP width, `a` position axes.

`sigma` is the noise level in [0, 1], 1 = pure noise: noised = (1 - sigma) * clean + sigma * noise, and the
velocity is noise - clean. Latents are in model space: already shifted and scaled.

The public names load at first use, so that `import flowcore` costs nothing:

    image = flowcore.generate("a red circle left of a blue square")
    flowcore.save_image(image, "out.png")
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .assets import list_builtin
    from .conditioning import Conditioning
    from .errors import CheckpointError, ConfigError, FlowCoreError, ShapeError
    from .images import read_settings, save_image
    from .pipeline import Pipeline, generate
    from .settings import Settings
    from .text.loading import load_text_encoder
    from .vae.autoencoder import load_vae
    from .weights.checkpoint import load_model

__version__ = "0.1.0"

_HOMES = {
    "list_builtin": "assets",
    "Conditioning": "conditioning",
    "CheckpointError": "errors",
    "ConfigError": "errors",
    "FlowCoreError": "errors",
    "ShapeError": "errors",
    "read_settings": "images",
    "save_image": "images",
    "Pipeline": "pipeline",
    "generate": "pipeline",
    "Settings": "settings",
    "load_text_encoder": "text.loading",
    "load_vae": "vae.autoencoder",
    "load_model": "weights.checkpoint",
}

__all__ = [
    "CheckpointError",
    "Conditioning",
    "ConfigError",
    "FlowCoreError",
    "Pipeline",
    "Settings",
    "ShapeError",
    "__version__",
    "generate",
    "list_builtin",
    "load_model",
    "load_text_encoder",
    "load_vae",
    "read_settings",
    "save_image",
]


def __getattr__(name: str) -> object:
    """Return a public name, from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return __all__
