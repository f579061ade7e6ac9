"""Descending grids of noise levels for sampling, and the shifts that move them towards noise or data.

Grids are float64 on the CPU; solvers read them there and hand the network float32.
"""

import math

import torch
from torch import Tensor

from ..errors import ConfigError

FULL_STRENGTH = 0.9999
"""Strengths above this are 1: ComfyUI's rule for its denoise setting."""


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """Sigma moved towards noise (shift above 1) or data (below 1); 0 and 1 stay, and shift 1 changes nothing.

    A translation by `log(shift)` in logits: shifts multiply, and the inverse has shift `1 / shift`. A shift
    stated in data time (1 = data) is its reciprocal here.

    Raises:
        ConfigError: shift is not above 0.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    check_shift(shift)
    moved = shift * sigma
    return moved / (moved + (1 - sigma))  # this form gives exactly 1 at 1


def check_shift(shift: float) -> None:
    """Refuse a shift that is not a finite number above 0.

    Raises:
        ConfigError: as said.
    """
    if not (math.isfinite(shift) and shift > 0):
        raise ConfigError(f"shift must be a number above 0, got {shift}; 1 leaves the grid as it is")


def flux1_mu(num_tokens: int) -> float:
    """Logarithm of FLUX.1's shift for a number of image tokens; linear, and never clamped."""
    return 0.5 + (num_tokens - 256) * (1.15 - 0.5) / (4096 - 256)


def flux2_mu(num_tokens: int, num_steps: int) -> float:
    """Logarithm of FLUX.2's empirical shift; jumps down above 4300 image tokens, as published."""
    high = 0.00016927 * num_tokens + 0.45666666
    if num_tokens > 4300:
        return high
    low = 8.73809524e-05 * num_tokens + 1.89833333
    slope = (high - low) / 190
    return slope * num_steps + (high - 200 * slope)


def resolution_shift(num_tokens: int, base_tokens: int) -> float:
    """Shift of Stable Diffusion 3 for a number of image tokens, `sqrt(num_tokens / base_tokens)`.

    Source: Esser et al. 2024, arXiv:2403.03206, section 5.3.2.
    """
    return math.sqrt(num_tokens / base_tokens)


def sigma_grid(
    num_steps: int, shift: float = 1.0, *, strength: float = 1.0, start: float | None = None
) -> Tensor:
    """Shifted uniform grid of descending levels that ends in 0.

    Shape: `num_steps + 1`, float64, on the CPU.

    Exactly num_steps intervals whatever the strength. With strength below 1 (image-to-image) it is the tail
    of the grid of `int(num_steps / strength)` steps, as in ComfyUI; with `start` it begins at exactly that
    level instead.

    Raises:
        ConfigError: num_steps below 1, shift not above 0, strength or start outside (0, 1], or both given.
    """
    if num_steps < 1:
        raise ConfigError(f"num_steps must be at least 1, got {num_steps}")
    check_shift(shift)
    if not 0 < strength <= 1:
        raise ConfigError(f"strength must lie above 0 and at most at 1, got {strength}; 1 ignores the source")
    if start is None:
        total = num_steps if strength > FULL_STRENGTH else int(num_steps / strength)
        return _grid(total, shift)[total - num_steps :]
    if not 0 < start <= 1:
        raise ConfigError(f"start must lie above 0 and at most at 1, got {start}; 1 is pure noise")
    if strength != 1:
        raise ConfigError(
            f"strength must be left at 1 when start is given, got {strength} with start {start}"
        )
    first = start / (start + shift * (1 - start))
    grid = shift_sigma(first * torch.arange(num_steps, -1, -1, dtype=torch.float64) / num_steps, shift)
    grid[0] = start
    return grid


def zero_init(sigmas: Tensor, num_steps: int = 1) -> Tensor:
    """The grid of a run whose first num_steps steps have velocity 0: the rest of it, with the same state.

    Those steps leave the state as it is and call no network, so the run starts later with the same noise.

    Raises:
        ConfigError: num_steps is negative or leaves no step.

    Source: Fan et al. 2025, arXiv:2503.18886 (CFG-Zero*).
    """
    if not 0 <= num_steps <= sigmas.shape[0] - 2:
        most = sigmas.shape[0] - 2
        raise ConfigError(f"zero-init steps must lie in 0..{most} for this grid, got {num_steps}")
    return sigmas[num_steps:]


def _grid(num_steps: int, shift: float) -> Tensor:
    steps = torch.arange(num_steps + 1, dtype=torch.float64)
    return shift_sigma(1 - steps / num_steps, shift)
