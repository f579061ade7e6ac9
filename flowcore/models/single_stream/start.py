"""The values that an untrained SingleStreamDiT starts with: it puts out exactly zero."""

from collections.abc import Iterable

from torch import nn

from .blocks import FusionBlock
from .fourier import ChannelMixer, FilteredResidual

_STD = 0.02


def initialize(
    embedders: Iterable[nn.Linear],
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
    for number, layer in enumerate(embedders):
        nn.init.normal_(layer.weight, std=_STD)
        if number:
            nn.init.zeros_(layer.bias)
    for token in tokens:
        nn.init.normal_(token, std=_STD)
    for block in blocks:
        _initialize_block(block)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def _initialize_block(block: nn.Module) -> None:
    if isinstance(block, FilteredResidual):
        for mlp in (block.filter.low_mlp, block.filter.high_mlp):
            nn.init.normal_(mlp[0].weight, std=_STD)
            nn.init.xavier_uniform_(mlp[2].weight, gain=0.1)
        return
    for parameter in block.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=_STD)
    if not isinstance(block, FusionBlock):
        return
    nn.init.zeros_(block.adaLN_modulation[1].weight)
    nn.init.zeros_(block.adaLN_modulation[1].bias)
    if block.local_bias.conv.bias is not None:
        nn.init.zeros_(block.local_bias.conv.bias)
    if isinstance(block.fourier_filter, ChannelMixer):
        first, last = block.fourier_filter.freq_mlp[0], block.fourier_filter.freq_mlp[2]
        nn.init.xavier_uniform_(first.weight)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
