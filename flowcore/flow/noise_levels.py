"""Laws from which training draws its noise levels, with their densities.

A law is two pure functions: `quantile`, from uniform numbers to sigma, and `density`. Whatever spreads the
uniform numbers (plain draws, strata) therefore works with every law.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from ..errors import ConfigError
from .beta import MAX_PARAMETER, beta_log_density, beta_quantile
from .schedule import check_shift, shift_sigma

DEFAULT_FLOOR = 1e-4
"""Drawn levels are kept this far from 0 and 1."""

MODE_LIMIT = 2 / (math.pi - 2)
"""Largest scale for which the mode law stays monotone."""


class NoiseLaw(Protocol):
    """A distribution over sigma in (0, 1)."""

    def quantile(self, u: Tensor) -> Tensor:
        """Sigma for uniform numbers u in [0, 1]; shape and dtype of u. It may fall or rise with u."""
        ...

    def density(self, sigma: Tensor) -> Tensor:
        """Probability density at sigma in (0, 1); shape and dtype of sigma."""
        ...


@dataclass(frozen=True, slots=True)
class Uniform:
    """Every level is equally likely."""

    def quantile(self, u: Tensor) -> Tensor:
        """Return u."""
        return u

    def density(self, sigma: Tensor) -> Tensor:
        """Return ones."""
        return torch.ones_like(sigma)


@dataclass(frozen=True, slots=True)
class LogitNormal:
    """The logit of sigma is normal with this mean and standard deviation.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        """Refuse a standard deviation that is not above 0."""
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ConfigError(
                f"std of the logit-normal law must be above 0, got {self.std} (mean {self.mean})"
            )

    def quantile(self, u: Tensor) -> Tensor:
        """Sigma at probability u."""
        return self.from_normal(torch.special.ndtri(u))

    def from_normal(self, z: Tensor) -> Tensor:
        """Sigma for standard normal numbers z; shape and dtype of z."""
        return torch.sigmoid(self.mean + self.std * z)

    def density(self, sigma: Tensor) -> Tensor:
        """Density at sigma in (0, 1)."""
        exponent = -((torch.logit(sigma) - self.mean) ** 2) / (2 * self.std**2)
        return torch.exp(exponent) / (self.std * math.sqrt(2 * math.pi) * sigma * (1 - sigma))


@dataclass(frozen=True, slots=True)
class Mode:
    """Heavier in the middle (scale above 0) or at both ends (below 0).

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """

    scale: float = 1.29

    def __post_init__(self) -> None:
        """Refuse a scale for which the map from u is not monotone."""
        if not -1 <= self.scale <= MODE_LIMIT:
            raise ConfigError(f"scale of the mode law must lie in -1..{MODE_LIMIT:.4f}, got {self.scale}")

    def quantile(self, u: Tensor) -> Tensor:
        """Sigma for uniform u; descending."""
        return 1 - u - self.scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)

    def density(self, sigma: Tensor) -> Tensor:
        """Density at sigma in (0, 1); the map from u is inverted by bisection in float64."""
        target = sigma.to(torch.float64)
        low, high = torch.zeros_like(target), torch.ones_like(target)
        for _ in range(60):
            middle = (low + high) / 2
            too_small = self.quantile(middle) > target
            low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
        slope = 1 + self.scale * (1 - math.pi / 2 * torch.sin(math.pi * (low + high) / 2))
        return (1 / slope).to(sigma.dtype)


@dataclass(frozen=True, slots=True)
class CosMap:
    """The law under which a uniform level of a cosine schedule has the same signal-to-noise ratio.

    Source: Esser et al. 2024, arXiv:2403.03206, section 3.1.
    """

    def quantile(self, u: Tensor) -> Tensor:
        """Sigma at probability u."""
        return 1 - 1 / (torch.tan(math.pi * u / 2) + 1)

    def density(self, sigma: Tensor) -> Tensor:
        """Density at sigma."""
        return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))


@dataclass(frozen=True, slots=True)
class Beta:
    """Beta(alpha, beta); the mean is alpha / (alpha + beta)."""

    alpha: float = 2.5
    beta: float = 2.0

    def __post_init__(self) -> None:
        """Refuse parameters outside (0, 100]."""
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if not 0 < value <= MAX_PARAMETER:
                raise ConfigError(f"{name} of the beta law must lie above 0 and at most at 100, got {value}")

    def quantile(self, u: Tensor) -> Tensor:
        """Sigma at probability u; computed in float64."""
        return beta_quantile(u, self.alpha, self.beta).to(u.dtype)

    def density(self, sigma: Tensor) -> Tensor:
        """Density at sigma in (0, 1)."""
        return torch.exp(beta_log_density(sigma, self.alpha, self.beta))


@dataclass(frozen=True, slots=True)
class Shifted:
    """Another law, every level moved by `shift_sigma`."""

    base: NoiseLaw
    shift: float

    def __post_init__(self) -> None:
        """Refuse a shift that is not above 0."""
        check_shift(self.shift)

    def quantile(self, u: Tensor) -> Tensor:
        """Shifted level of the base law."""
        return shift_sigma(self.base.quantile(u), self.shift)

    def density(self, sigma: Tensor) -> Tensor:
        """Density of the base law at the level before the shift, times the derivative of the way back."""
        back = 1 / self.shift
        slope = back / (1 + (back - 1) * sigma) ** 2
        return self.base.density(shift_sigma(sigma, back)) * slope


LAWS: Final[Mapping[str, Callable[..., NoiseLaw]]] = {
    "uniform": Uniform,
    "logit_normal": LogitNormal,
    "mode": Mode,
    "cosmap": CosMap,
    "beta": Beta,
}


def shifted(law: NoiseLaw, shift: float) -> NoiseLaw:
    """The law after a shift: itself for shift 1, again a logit-normal for a logit-normal."""
    check_shift(shift)
    if shift == 1:
        return law
    if isinstance(law, LogitNormal):
        return LogitNormal(law.mean + math.log(shift), law.std)
    return Shifted(law, shift)


def noise_law(name: str, *, shift: float = 1.0, **parameters: float) -> NoiseLaw:
    """The named law with its parameters, then shifted.

    Raises:
        ConfigError: the name or a parameter is unknown, or a value is out of range.
    """
    if name not in LAWS:
        raise ConfigError(f"noise law must be one of {', '.join(LAWS)}, got {name!r}")
    try:
        law = LAWS[name](**parameters)
    except TypeError as err:
        raise ConfigError(
            f"parameters of the noise law {name} must be its own, got {sorted(parameters)}"
        ) from err
    return shifted(law, shift)


def stratified_uniform(batch: int, generator: torch.Generator) -> Tensor:
    """One uniform number in each of `batch` equal parts of [0, 1), in random order. Shape: `b`, float64."""
    jitter = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    return (torch.randperm(batch, generator=generator, device=generator.device) + jitter) / batch


def sample_sigma(
    law: str | NoiseLaw,
    batch: int,
    generator: torch.Generator,
    *,
    stratified: bool = False,
    floor: float = DEFAULT_FLOOR,
    **parameters: float,
) -> Tensor:
    """Noise levels for one training batch. Shape: `b`, float32, on the generator's device.

    Uniform numbers are drawn and mapped in float64; the result is clamped to [floor, 1 - floor] in float32,
    where 1 - floor is not 1 (in bfloat16 it would be). Floor 0 switches the clamp off.

    Args:
        law: a law, or a name of LAWS with its parameters (and shift) as keywords.
        batch: number of levels.
        generator: source of the uniform numbers.
        stratified: draw one level from each of `batch` equally likely parts of the law.
        floor: 0, or 1e-6 to 0.01.
        **parameters: `mean`, `std`, `scale`, `alpha`, `beta`, `shift`, as the named law has them.

    Raises:
        ConfigError: the law or a parameter is unknown, a value is out of range, or a law object came with
            them.
    """
    if floor != 0 and not 1e-6 <= floor <= 1e-2:
        raise ConfigError(f"floor must be 0 or lie in 1e-6..0.01, got {floor}")
    if isinstance(law, str):
        law = noise_law(law, **parameters)
    elif parameters:
        raise ConfigError(f"a law object must come without parameters, got {sorted(parameters)}")
    if stratified:
        u = stratified_uniform(batch, generator)
    else:
        u = torch.rand(batch, generator=generator, device=generator.device, dtype=torch.float64)
    sigma = law.quantile(u).to(torch.float32)
    return sigma.clamp(floor, 1 - floor) if floor else sigma


def density_correction(sigma: Tensor, drawn: NoiseLaw, wanted: NoiseLaw) -> Tensor:
    """Weights `wanted / drawn` that turn a mean over one law into a mean over another. Shape: like sigma."""
    return wanted.density(sigma) / drawn.density(sigma)
