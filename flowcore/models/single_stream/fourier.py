"""Filters that act on the image's tokens by spatial frequency, in float32 whatever the model computes in.

The spectrum that comes out of either is not that of a real image: the two halves of a column that stands for
itself disagree. What is taken is the real part, row by row, as the reference's CPU results have it; a fused
two-dimensional inverse gives other values on some devices.

Source: Particle1904/SingleStreamDiT_T5Gemma2, model.py: FourierFilter at 333d3fa and at 01b01b7.
"""

import contextlib
import math
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ...layers.norm import RMSNorm, at_use
from ...ops import Ops
from .config import SingleStreamConfig

_PADDING = 2
_DIAGONAL = 0.70710678  # largest frequency, in cycles per token, that a grid holds


class ChannelMixer(nn.Module):
    """V3's filter: the same two-layer network on the channels of every frequency, gated.

    No weight depends on the grid. Low frequencies grow with its size, so that a larger image does not meet
    the same function at another scale.
    """

    def __init__(self, config: SingleStreamConfig, *, ops: Ops, device: torch.device | str | None) -> None:
        super().__init__()
        exact: dict[str, Any] = {"device": device, "dtype": torch.float32}
        width, hidden = 2 * config.hidden_size, int(1.5 * config.hidden_size)
        self.gate = nn.Parameter(torch.full((1,), config.fourier_gate, **exact))
        self.freq_mlp = nn.Sequential(
            ops.float_linear(width, hidden, **exact), nn.SiLU(), ops.float_linear(hidden, width, **exact)
        )

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return `b n d` of image tokens x `b n d`, float32."""
        with _no_autocast(x.device):
            grid = rearrange(x.float(), "b (h w) d -> b h w d", h=rows, w=columns)
            spectrum = torch.fft.rfft2(grid, dim=(1, 2), norm="ortho")  # b h f d
            # Real and imaginary part of a channel are neighbours.
            parts = rearrange(torch.view_as_real(spectrum), "b h f d two -> b h f (d two)")
            mixed = rearrange(self.freq_mlp(parts), "b h f (d two) -> b h f d two", two=2)
            grid = _to_grid(torch.view_as_complex(mixed), columns, at_use(self.gate, x).tanh())
            return rearrange(grid, "b h w d -> b (h w) d")


class SpectralGain(nn.Module):
    """HEAD's filter: amplitude and phase of every channel as functions of the frequency, gated.

    Two networks, blended at a learned cutoff, give the gain at any frequency, so that every grid samples the
    same curve. The image is continued by reflection on all sides.
    """

    def __init__(self, config: SingleStreamConfig, *, ops: Ops, device: torch.device | str | None) -> None:
        super().__init__()
        exact: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.low_mlp, self.high_mlp = (
            nn.Sequential(
                ops.float_linear(2, 64, bias=False, **exact),
                nn.SiLU(),
                ops.float_linear(64, 2 * config.hidden_size, bias=False, **exact),
            )
            for _ in range(2)
        )
        self.raw_cutoff = nn.Parameter(torch.tensor(-1.0, **exact))
        self.raw_scale = nn.Parameter(torch.tensor(3.0, **exact))
        self.gate = nn.Parameter(torch.full((1,), config.fourier_gate, **exact))

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return `b n d` of image tokens x `b n d`, float32; the grid has at least 3 x 3 tokens."""
        height, width = rows + 2 * _PADDING, columns + 2 * _PADDING
        with _no_autocast(x.device):
            grid = rearrange(x.float(), "b (h w) d -> b d h w", h=rows, w=columns)
            padded = functional.pad(grid, (_PADDING,) * 4, mode="reflect")
            spectrum = torch.fft.rfft2(rearrange(padded, "b d h w -> b h w d"), dim=(1, 2), norm="ortho")
            gain = self._gain(height, width, x)
            whole = _to_grid(spectrum * gain, width, at_use(self.gate, x).tanh())
            inner = whole[:, _PADDING:-_PADDING, _PADDING:-_PADDING]
            return rearrange(inner, "b h w d -> b (h w) d")

    def _gain(self, height: int, width: int, like: Tensor) -> Tensor:
        """Return the complex factors `h f d` of a spectrum."""
        fy = torch.fft.fftfreq(height, device=like.device)
        fx = torch.fft.rfftfreq(width, device=like.device)
        places = torch.stack(torch.meshgrid(fy, fx, indexing="ij"), dim=-1)  # h f 2
        radius = places.square().sum(-1, keepdim=True).sqrt() / _DIAGONAL
        cutoff, scale = (
            at_use(self.raw_cutoff, like).sigmoid(),
            functional.softplus(at_use(self.raw_scale, like)),
        )
        share = torch.sigmoid((cutoff - radius) * scale)  # h f 1
        blend = torch.lerp(self.high_mlp(places), self.low_mlp(places), share)  # h f (two d)
        amplitude, phase = blend.chunk(2, dim=-1)
        return torch.polar(amplitude.tanh().exp(), math.pi * phase)


class FilteredResidual(nn.Module):
    """One step of HEAD's final stack: norm and filter, added to the image tokens."""

    def __init__(self, config: SingleStreamConfig, *, ops: Ops, device: torch.device | str | None) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, device)
        self.filter = SpectralGain(config, ops=ops, device=device)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Return the image tokens `b n d`, float32."""
        result: Tensor = x + self.filter(self.norm(x), rows, columns)
        return result


def _to_grid(spectrum: Tensor, columns: int, factor: Tensor) -> Tensor:
    """Return factor times the real grid `b h w d` of a half spectrum `b h f d`."""
    lines = torch.view_as_real(torch.fft.ifft(spectrum, dim=1, norm="ortho"))  # b h f d two
    own = torch.arange(lines.shape[2], device=spectrum.device) * 2 % columns == 0  # frequencies 0 and 1/2
    weight = torch.stack((torch.ones_like(own), ~own), dim=-1) * factor  # f two
    lines = torch.view_as_complex(lines * weight[:, None])
    grid: Tensor = torch.fft.irfft(lines, n=columns, dim=2, norm="ortho")
    return grid


def _no_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Return the context in which matrices keep float32; there is no autocast on the meta device."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
