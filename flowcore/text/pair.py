"""Two text encoders as one: token states from the one, the vector of the prompt from the other."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..conditioning import Conditioning
from .encoder import NetworkTextEncoder, TextMode


class PairTextEncoder:
    """An encoder of token states with a CLIP text model for the pooled vector."""

    def __init__(self, states: NetworkTextEncoder, vector: NetworkTextEncoder) -> None:
        """Join them."""
        self.states, self.vector = states, vector

    @property
    def width(self) -> int:
        """Length of a token state."""
        return self.states.width

    @property
    def pooled_width(self) -> int:
        """Length of the vector of a whole prompt."""
        return self.vector.width

    @property
    def identity(self) -> str:
        """What a cache knows the encoder by."""
        return f"{self.states.identity}-{self.vector.identity}"

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "PairTextEncoder":
        """Move the weights in place and return self."""
        self.states.to(device, dtype)
        self.vector.to(device, dtype)
        return self

    def encode(self, prompts: Sequence[str], mode: TextMode = "sequence") -> Conditioning:
        """Return the prompts' conditioning, float32. Raises: ConfigError as the parts do."""
        pooled = self.vector.encode(prompts).pooled
        return replace(self.states.encode(prompts, mode), pooled=pooled)

    def unknown_words(self, prompt: str) -> list[str]:
        """Return the parts of a prompt that the tokenizer of the token states does not know, in order."""
        return self.states.unknown_words(prompt)
