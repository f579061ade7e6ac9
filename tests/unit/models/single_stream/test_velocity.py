"""The adapter to the project's convention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flowcore.conditioning import Conditioning
from flowcore.errors import ShapeError
from flowcore.models.single_stream import velocity


class Recorder:
    """A forward that keeps what it is called with."""

    def __init__(self) -> None:
        self.arguments: tuple[Any, ...] = ()
        self.keywords: dict[str, Any] = {}

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        self.arguments, self.keywords = arguments, keywords
        return arguments[0] * 2


def test_sign_time_and_dtype() -> None:
    forward, latents, sigma = Recorder(), torch.randn(2, 4, 4, 4), torch.tensor([0.25, 1.0])
    context, mask = torch.randn(1, 3, 8), torch.tensor([[True, True, False]])
    conditioning = Conditioning(context=context, context_mask=mask)
    result = velocity(forward, latents, sigma, conditioning, dtype=torch.bfloat16, generator=None)
    assert result.dtype == torch.float32
    assert torch.equal(result, -(latents.bfloat16() * 2).float())
    given, times, text = forward.arguments
    assert (given.dtype, text.dtype, text.shape) == (torch.bfloat16, torch.bfloat16, (2, 3, 8))
    assert times.dtype == torch.float32
    assert times.tolist() == [0.75, 0.0]
    assert forward.keywords["text_mask"].shape == (2, 3)
    assert forward.keywords["generator"] is None


def test_no_context_is_no_text() -> None:
    forward = Recorder()
    velocity(forward, torch.zeros(2, 4, 4, 4), torch.ones(2), Conditioning())
    assert forward.arguments[2] is None


def test_extras_are_refused() -> None:
    conditioning = Conditioning(extras={"guidance": torch.ones(1)})
    with pytest.raises(ShapeError, match=r"must have no extras, got \['guidance'\]"):
        velocity(Recorder(), torch.zeros(1, 4, 4, 4), torch.ones(1), conditioning)
