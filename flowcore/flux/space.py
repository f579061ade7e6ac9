"""Data spaces: a codec and the statistics of its channels, which stay with the weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ..errors import CheckpointError, ConfigError, ShapeError
from .codecs import Codec, codec_from_dict, codec_to_dict

METADATA_KEY = "flowcore.space"
_LEAST_STD = 1e-6


class Tokens(NamedTuple):
    """A batch of sequences: tokens `b n c` and their positions `1 n a`."""

    tokens: Tensor
    ids: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """A codec whose tokens have mean 0 and standard deviation 1 in every channel.

    mean, std: one number a channel, of the codec's own tokens.
    """

    codec: Codec
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check the statistics. Raises: ConfigError."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.codec.channels:
                raise ConfigError(
                    f"{name} of a {self.codec.kind} space must hold {self.codec.channels} numbers, "
                    f"got {len(values)}"
                )
        if min(self.std) <= 0:
            raise ConfigError(f"std of a {self.codec.kind} space must be above 0, got {min(self.std)}")

    @classmethod
    def fit(cls, codec: Codec, samples: Tensor) -> "Space":
        """Return the space with the statistics of samples `b ...`; a constant channel keeps its size.

        Raises: ShapeError if the samples are not of the codec's shape.
        """
        _check_samples(codec, samples)
        channels = codec.encode(samples).double().flatten(0, 1)  # (b n) c
        std = channels.std(dim=0, correction=0)
        std = torch.where(std < _LEAST_STD, torch.ones_like(std), std)
        return cls(codec=codec, mean=tuple(channels.mean(dim=0).tolist()), std=tuple(std.tolist()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Space":
        """Return the space of a table: the inverse of `to_dict`. Raises: ConfigError."""
        rest = dict(values)
        mean, std = rest.pop("mean", None), rest.pop("std", None)
        if not isinstance(mean, list) or not isinstance(std, list):
            raise ConfigError(f"a space must state mean and std as lists, got {sorted(values)}")
        return cls(codec=codec_from_dict(rest), mean=tuple(mean), std=tuple(std))

    def to_dict(self) -> dict[str, Any]:
        """Return the space as JSON-like values."""
        return {**codec_to_dict(self.codec), "mean": list(self.mean), "std": list(self.std)}

    def encode(self, samples: Tensor) -> Tokens:
        """Return the normalised tokens of samples `b ...`, float32.

        Raises: ShapeError if the samples are not of the codec's shape.
        """
        _check_samples(self.codec, samples)
        tokens = self.codec.encode(samples)
        mean, std = (tokens.new_tensor(values) for values in (self.mean, self.std))
        return Tokens(((tokens - mean) / std).float(), self.codec.positions().to(tokens.device))

    def decode(self, tokens: Tensor) -> Tensor:
        """Return the samples of normalised tokens `b n c`."""
        mean, std = (tokens.new_tensor(values) for values in (self.mean, self.std))
        return self.codec.decode(tokens * std + mean)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpacePair:
    """What a model goes by and what it makes."""

    condition: Space
    data: Space

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "SpacePair":
        """Return the spaces that a model's file states. Raises: CheckpointError if it states none."""
        try:
            table = json.loads(metadata[METADATA_KEY])
            return cls(condition=Space.from_dict(table["condition"]), data=Space.from_dict(table["data"]))
        except (KeyError, ValueError, TypeError) as err:
            raise CheckpointError(
                f"metadata {METADATA_KEY} must describe the spaces condition and data, got {err}; "
                "use a model of python -m training.sequences"
            ) from err

    def to_metadata(self) -> dict[str, str]:
        """Return the metadata entry that a model's file gets."""
        table = {"condition": self.condition.to_dict(), "data": self.data.to_dict()}
        return {METADATA_KEY: json.dumps(table)}

    @property
    def num_axes(self) -> int:
        """Position axes of a model for both."""
        return max(space.codec.positions().shape[-1] for space in (self.condition, self.data))

    def encode_condition(self, samples: Tensor) -> Tokens:
        """Return tokens and positions of conditions, with the axes of both spaces."""
        return self._widened(self.condition.encode(samples))

    def encode_data(self, samples: Tensor) -> Tokens:
        """Return tokens and positions of data, with the axes of both spaces."""
        return self._widened(self.data.encode(samples))

    def data_positions(self) -> Tensor:
        """Return the positions `1 n a` of data."""
        return self._with_axes(self.data.codec.positions())

    def _widened(self, coded: Tokens) -> Tokens:
        return Tokens(coded.tokens, self._with_axes(coded.ids))

    def _with_axes(self, ids: Tensor) -> Tensor:
        """Return positions with zeros on the axes that only the other space has."""
        return functional.pad(ids, (0, self.num_axes - ids.shape[-1]))


def _check_samples(codec: Codec, samples: Tensor) -> None:
    if tuple(samples.shape[1:]) != codec.shape or samples.shape[0] < 1:
        expected = " ".join(map(str, codec.shape))
        raise ShapeError(
            f"samples of this {codec.kind} space must have shape b {expected}, got {tuple(samples.shape)}"
        )
