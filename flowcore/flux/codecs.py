"""Codecs: what a Flux reads and writes as tokens, each an invertible map between samples and tokens.

A sample of a codec has one fixed shape. Positions say where a token belongs: the first axis is the tag of the
space or the number of a condition, the others are geometry.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional

from ..errors import ConfigError
from ..layers.reading import check_names
from ..models.flux.packing import grid_ids, pack, unpack


class Codec(Protocol):
    """A map between samples `b ...` and tokens `b n c`, with the tokens' positions."""

    kind: ClassVar[str]
    """Its name in metadata and configurations."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""

    @property
    def channels(self) -> int:
        """Channels of a token."""

    def positions(self) -> Tensor:
        """Return the positions `1 n a` of the tokens, int64."""

    def encode(self, samples: Tensor) -> Tensor:
        """Return the tokens of samples."""

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the samples of tokens: the inverse of `encode` as far as the codec keeps everything."""


@dataclass(frozen=True)
class Points:
    """Points of `dim` coordinates, samples `b n dim`, a token a point.

    Points of a set that is not ordered all have the same position, so the order of a set says nothing.
    """

    kind: ClassVar[str] = "points"
    count: int
    dim: int
    is_ordered: bool = True
    tag: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Points, coordinates."""
        return self.count, self.dim

    @property
    def channels(self) -> int:
        """One a coordinate."""
        return self.dim

    def positions(self) -> Tensor:
        """Return (tag, number of the point), or (tag, 0) for every point of a set."""
        places = torch.arange(self.count) if self.is_ordered else torch.zeros(self.count, dtype=torch.int64)
        return torch.stack((torch.full_like(places, self.tag), places), dim=1)[None]

    def encode(self, samples: Tensor) -> Tensor:
        """Return the points themselves."""
        return samples

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the tokens themselves."""
        return tokens


@dataclass(frozen=True)
class Fourier:
    """Closed curves of points in the plane, samples `b count 2`, a token a harmonic k = 1, 2, ...

    Channels: the factors of cos ks and sin ks of x, then of y, times k * sqrt(sum 1 / k^2), so that curves
    whose harmonics fall like 1 / k have channels of like size. Constant and higher harmonics are not kept.
    """

    kind: ClassVar[str] = "fourier"
    harmonics: int
    count: int

    def __post_init__(self) -> None:
        """Check that the points tell the harmonics apart. Raises: ConfigError."""
        if self.count <= 2 * self.harmonics:
            raise ConfigError(
                f"count of a fourier space must be above 2 * harmonics = {2 * self.harmonics}, "
                f"got {self.count}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Points, coordinates."""
        return self.count, 2

    @property
    def channels(self) -> int:
        """Cosine and sine for x and y."""
        return 4

    @cached_property
    def _basis(self) -> Tensor:
        """Return weighted harmonics `n k 2`, float64: point s = 2 pi n / count, cosine and sine."""
        number = torch.arange(1, self.harmonics + 1, dtype=torch.float64)
        angle = torch.arange(self.count, dtype=torch.float64)[:, None] * number * (2 * math.pi / self.count)
        weights = number * number.pow(-2).sum().sqrt()
        return torch.stack((angle.cos(), angle.sin()), dim=-1) / weights[:, None]

    def positions(self) -> Tensor:
        """Return (k, 0)."""
        number = torch.arange(1, self.harmonics + 1)
        return torch.stack((number, torch.zeros_like(number)), dim=1)[None]

    def encode(self, samples: Tensor) -> Tensor:
        """Return the weighted Fourier coefficients."""
        dual = self._basis / self._basis.pow(2).sum(dim=0)
        return rearrange(
            torch.einsum("b n x, n k w -> b k x w", samples, dual.to(samples)), "b k x w -> b k (x w)"
        )

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the points of the curve."""
        factors = rearrange(tokens, "b k (x w) -> b k x w", w=2)
        return torch.einsum("b k x w, n k w -> b n x", factors, self._basis.to(tokens))


@dataclass(frozen=True)
class Patches:
    """Pictures or latents `b colors height width`, a token a square of `patch` a side as FLUX.1 packs it."""

    kind: ClassVar[str] = "patches"
    patch: int
    colors: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Check the sides. Raises: ConfigError."""
        _check_sides(self.kind, self.patch, self.height, self.width)

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, rows, columns."""
        return self.colors, self.height, self.width

    @property
    def channels(self) -> int:
        """Values of a square."""
        return self.colors * self.patch**2

    def positions(self) -> Tensor:
        """Return (0, row, column)."""
        return grid_ids(self.height // self.patch, self.width // self.patch)

    def encode(self, samples: Tensor) -> Tensor:
        """Return the squares, rows first."""
        return pack(samples, self.patch)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the pictures."""
        return unpack(tokens, self.height // self.patch, self.width // self.patch, self.patch)


@dataclass(frozen=True)
class Dct:
    """Pictures `b colors height width`, a token the first `keep` cosine coefficients of a square, in zig-zag.

    The transform (type II) is orthonormal: with all coefficients kept, errors of tokens are errors of pixels.
    """

    kind: ClassVar[str] = "dct"
    patch: int
    keep: int
    colors: int
    height: int
    width: int

    def __post_init__(self) -> None:
        """Check the sides and the number of coefficients. Raises: ConfigError."""
        _check_sides(self.kind, self.patch, self.height, self.width)
        if not 1 <= self.keep <= self.patch**2:
            raise ConfigError(f"keep of a dct space must lie in 1..{self.patch**2}, got {self.keep}")

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, rows, columns."""
        return self.colors, self.height, self.width

    @property
    def channels(self) -> int:
        """Coefficients of a square."""
        return self.colors * self.keep

    @cached_property
    def _basis(self) -> Tensor:
        """Return the kept functions `keep (p q)` on a square, float64."""
        number = torch.arange(self.patch, dtype=torch.float64)
        waves = torch.cos(math.pi / self.patch * (number + 0.5) * number[:, None]) * math.sqrt(2 / self.patch)
        waves[0] /= math.sqrt(2)
        order = sorted(
            ((u, v) for u in range(self.patch) for v in range(self.patch)),
            key=lambda uv: (sum(uv), uv[0] if sum(uv) % 2 else uv[1]),
        )
        return torch.stack([torch.outer(waves[u], waves[v]).flatten() for u, v in order[: self.keep]])

    def positions(self) -> Tensor:
        """Return (0, row, column)."""
        return grid_ids(self.height // self.patch, self.width // self.patch)

    def encode(self, samples: Tensor) -> Tensor:
        """Return the kept coefficients of every square."""
        squares = rearrange(pack(samples, self.patch), "b n (c s) -> b n c s", c=self.colors)
        return rearrange(squares @ self._basis.to(samples).T, "b n c k -> b n (c k)")

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the pictures, without what was not kept."""
        squares = rearrange(tokens, "b n (c k) -> b n c k", c=self.colors) @ self._basis.to(tokens)
        rows, columns = self.height // self.patch, self.width // self.patch
        return unpack(rearrange(squares, "b n c s -> b n (c s)"), rows, columns, self.patch)


@dataclass(frozen=True)
class Symbols:
    """Sequences of symbols 0..size-1, samples `b count` of whole numbers, a token a symbol as one-hot.

    Tokens are decoded to their largest channels.
    """

    kind: ClassVar[str] = "symbols"
    size: int
    count: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Symbols."""
        return (self.count,)

    @property
    def channels(self) -> int:
        """One a symbol that there is."""
        return self.size

    def positions(self) -> Tensor:
        """Return (1 + k, 0, 0)."""
        number = torch.arange(1, self.count + 1)
        return functional.pad(number[None, :, None], (0, 2))

    def encode(self, samples: Tensor) -> Tensor:
        """Return the corner of the simplex of every symbol. Raises: ConfigError for other symbols."""
        numbers = samples.long()
        if numbers.min() < 0 or numbers.max() >= self.size:
            raise ConfigError(
                f"symbols must lie in 0..{self.size - 1}, got {int(numbers.min())}..{int(numbers.max())}"
            )
        return functional.one_hot(numbers, self.size).float()

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the nearest symbols."""
        return tokens.argmax(dim=-1)


@dataclass(frozen=True)
class Series:
    """Series of `count` moments, samples `b count colors`, a token `window` moments in a row."""

    kind: ClassVar[str] = "series"
    window: int
    count: int
    colors: int = 1

    def __post_init__(self) -> None:
        """Check the length. Raises: ConfigError."""
        if self.count % self.window:
            raise ConfigError(
                f"count of a series space must be a multiple of window = {self.window}, got {self.count}"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Moments, channels."""
        return self.count, self.colors

    @property
    def channels(self) -> int:
        """Values of a window."""
        return self.window * self.colors

    def positions(self) -> Tensor:
        """Return (0, number of the window)."""
        number = torch.arange(self.count // self.window)
        return functional.pad(number[None, :, None], (1, 0))

    def encode(self, samples: Tensor) -> Tensor:
        """Return the windows."""
        return rearrange(samples, "b (n w) c -> b n (w c)", w=self.window)

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the series."""
        return rearrange(tokens, "b n (w c) -> b (n w) c", w=self.window)


CODECS: Mapping[str, type[Any]] = {
    codec.kind: codec for codec in (Points, Fourier, Patches, Dct, Symbols, Series)
}


def codec_from_dict(values: Mapping[str, Any]) -> Codec:
    """Return the codec of a table with `kind` and its fields. Raises: ConfigError that names the field."""
    kind = values.get("kind")
    if not isinstance(kind, str) or kind not in CODECS:
        raise ConfigError(f"kind of a space must be one of {', '.join(CODECS)}, got {kind!r}")
    rest = {name: value for name, value in values.items() if name != "kind"}
    cls = CODECS[kind]
    check_names(cls, rest)
    for field in fields(cls):
        value = rest.get(field.name, field.default)
        is_switch = field.type in (bool, "bool")
        if type(value) is not (bool if is_switch else int) or (
            not is_switch and value < (field.name != "tag")
        ):
            what = "true or false" if is_switch else "a whole number of at least 1"
            got = "nothing" if field.name not in rest else repr(value)
            raise ConfigError(f"{field.name} of a {kind} space must be {what}, got {got}")
    codec: Codec = cls(**rest)
    return codec


def codec_to_dict(codec: Codec) -> dict[str, Any]:
    """Return the table of a codec: the inverse of `codec_from_dict`."""
    return {"kind": codec.kind, **asdict(codec)}  # type: ignore[call-overload]  # every codec is a dataclass


def _check_sides(kind: str, patch: int, height: int, width: int) -> None:
    if height % patch or width % patch:
        raise ConfigError(
            f"height and width of a {kind} space must be multiples of patch = {patch}, "
            f"got {height} and {width}"
        )
