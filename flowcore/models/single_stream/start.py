"""The values that an untrained SingleStreamDiT starts with: it puts out exactly zero."""

from collections.abc import Iterable
from typing import cast

from torch import nn

from .blocks import FusionBlock
from .fourier import ChannelMixer, FilteredResidual, SpectralGain

_STD = 0.02


def initialize(
    embedders: Iterable[nn.Module],
    tokens: Iterable[nn.Parameter],
    blocks: Iterable[nn.Module],
    last: nn.Linear,
) -> None:
    """Set weights in place; whatever is not named here keeps the value that its layer was built with.

    Args:
        embedders: of image tokens, text and time, the first of which keeps torch's bias.
        tokens: learned vectors.
        blocks: every block.
        last: the projection to the output.
    """
    for number, layer in enumerate(cast("Iterable[nn.Linear]", embedders)):
        nn.init.normal_(layer.weight, std=_STD)
        if number:
            nn.init.zeros_(layer.bias)
    for token in tokens:
        nn.init.normal_(token, std=_STD)
    for block in blocks:
        if isinstance(block, FilteredResidual):
            _initialize_gain(block.filter)
        else:
            _initialize_block(block)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def _initialize_gain(gain: SpectralGain) -> None:
    for mlp in (gain.low_mlp, gain.high_mlp):
        first, second = _layers(mlp)
        nn.init.normal_(first.weight, std=_STD)
        nn.init.xavier_uniform_(second.weight, gain=0.1)


def _initialize_block(block: nn.Module) -> None:
    for parameter in block.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=_STD)
    if not isinstance(block, FusionBlock):
        return
    (modulation,) = _layers(block.adaLN_modulation)
    nn.init.zeros_(modulation.weight)
    nn.init.zeros_(modulation.bias)
    if block.local_bias.conv.bias is not None:
        nn.init.zeros_(block.local_bias.conv.bias)
    if isinstance(block.fourier_filter, ChannelMixer):
        first, second = _layers(block.fourier_filter.freq_mlp)
        nn.init.xavier_uniform_(first.weight)
        nn.init.zeros_(second.weight)
        nn.init.zeros_(second.bias)


def _layers(sequence: nn.Sequential) -> list[nn.Linear]:
    """Return the layers with weights; a host may bring classes of its own."""
    return [cast("nn.Linear", layer) for layer in sequence if hasattr(layer, "weight")]
