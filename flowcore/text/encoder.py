"""What every text encoder offers: prompts to conditioning, widths, and an identity for caches."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from ..conditioning import Conditioning, TextShape
from ..errors import ConfigError
from ..weights.placement import move
from .tokens import check_prompts, unknown_words

TextMode: TypeAlias = Literal["sequence", "pooled"]
DEFAULT_SHAPE = TextShape(width=None, length=128)
"""Of encoders that are used without a model."""


class TextEncoder(Protocol):
    """A text encoder, of one network or of several."""

    @property
    def width(self) -> int:
        """Length of a token state."""

    @property
    def pooled_width(self) -> int | None:
        """Length of the vector of a whole prompt; None = it gives none."""

    @property
    def identity(self) -> str:
        """What a cache knows the encoder by: weights, dtype, tokenizer and length decide it."""

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TextEncoder":
        """Move the weights in place and return self; None leaves either as it is."""

    def encode(self, prompts: Sequence[str], mode: TextMode = "sequence") -> Conditioning:
        """Return the prompts' conditioning, float32, where the weights are."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the parts of a prompt that the tokenizer does not know, in order."""


class NetworkTextEncoder(ABC):
    """A network of transformers with its tokenizer, for models that read texts of a shape. It is frozen."""

    kind: ClassVar[str]
    """Name of the sort of encoder, as in `TextFiles.kind`."""
    modes: ClassVar[tuple[str, ...]] = ("sequence",)

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - of transformers
        tokenizer: Any,  # noqa: ANN401
        shape: TextShape | None = None,
    ) -> None:
        """Join a network and a tokenizer; shape None = `DEFAULT_SHAPE`."""
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.shape = shape or DEFAULT_SHAPE

    @property
    def width(self) -> int:
        """Length of a token state."""
        return int(self.model.config.hidden_size)

    @property
    def pooled_width(self) -> int | None:
        """Length of the vector of a whole prompt; None = it gives none."""
        return None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        device: torch.device = next(self.model.parameters()).device
        return device

    @property
    def identity(self) -> str:
        """What a cache knows the encoder by: weights, dtype, tokenizer and length decide it."""
        return f"{self.kind}-{_digest(self.model, self.tokenizer, self._facts())}"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "NetworkTextEncoder":
        """Move the weights in place and return self; tables of positions stay float32 whatever the dtype."""
        move(self.model, device, dtype)
        return self

    @abstractmethod
    def tokenize(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return token ids `b m` and the mask `b m`, True = real. Raises: ConfigError for a foreign token."""

    def encode(self, prompts: Sequence[str], mode: TextMode = "sequence") -> Conditioning:
        """Return the prompts' conditioning, float32; no prompt changes another's.

        Raises: ConfigError if there is no prompt, a token is not the network's, or the mode is unknown.
        """
        if mode not in self.modes:
            raise ConfigError(
                f"the text mode of a {self.kind} encoder must be one of {', '.join(self.modes)}, got {mode!r}"
            )
        check_prompts(prompts)
        ids, mask = (part.to(self.device) for part in self.tokenize(prompts))
        return self.condition(ids, mask, mode)

    @abstractmethod
    def condition(self, ids: Tensor, mask: Tensor, mode: str) -> Conditioning:
        """Return the conditioning of what `tokenize` gave."""

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the parts of a prompt that the tokenizer does not know, in order."""
        return unknown_words(self.tokenizer, prompt)

    def _facts(self) -> tuple[object, ...]:
        """Return what decides the states besides weights and tokenizer."""
        return (self.shape,)


def _digest(model: nn.Module, tokenizer: Any, facts: tuple[object, ...]) -> str:  # noqa: ANN401
    """Return a hash of everything that decides what an encoder says."""
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def token_id(config: Any, name: str) -> int:  # noqa: ANN401 - a class of transformers
    """Return the id of a special token in a network's settings. Raises: ConfigError."""
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise ConfigError(f"{name} of the text encoder's config must be one number, got {value!r}")
    return value
