"""Flux as what it was made for: one token sequence carried into another, in a different data space.

    trained = load_transport("runs/flux_curves/final/model.safetensors")
    points = transport(trained.model, curves, space=trained.spaces)

`python -m training.sequences` trains such models.
"""

from .codecs import CODECS, Codec, Dct, Fourier, Patches, Points, Series, Symbols, codec_from_dict
from .numbers import samples_from_text, samples_to_text
from .pictures import draw_samples
from .space import Space, SpacePair, Tokens
from .transport import TransportModel, conditioning_of, load_transport, transport, velocity_fn

__all__ = [
    "CODECS",
    "Codec",
    "Dct",
    "Fourier",
    "Patches",
    "Points",
    "Series",
    "Space",
    "SpacePair",
    "Symbols",
    "Tokens",
    "TransportModel",
    "codec_from_dict",
    "conditioning_of",
    "draw_samples",
    "load_transport",
    "samples_from_text",
    "samples_to_text",
    "transport",
    "velocity_fn",
]
