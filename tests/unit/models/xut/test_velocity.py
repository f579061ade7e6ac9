"""The adapter to the project's convention."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flowcore.conditioning import Conditioning
from flowcore.errors import ShapeError
from flowcore.models.xut import PRESETS, size_extras, velocity


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
    conditioning = Conditioning(context=context, context_mask=mask, extras={"addon_info": torch.zeros(1)})
    result = velocity(forward, latents, sigma, conditioning, dtype=torch.bfloat16, tread_rate=0.1)
    assert result.dtype == torch.float32
    assert torch.equal(result, (latents.bfloat16() * 2).float())
    given, times, text = forward.arguments
    assert (given.dtype, text.dtype, text.shape) == (torch.bfloat16, torch.bfloat16, (2, 3, 8))
    assert torch.equal(times, sigma)
    assert forward.keywords["ctx_mask"].shape == (2, 3)
    assert forward.keywords["addon_info"].shape == (2,)
    assert forward.keywords["tread_rate"] == 0.1


def test_class_ids_take_the_place_of_the_context() -> None:
    forward = Recorder()
    ids = torch.tensor([3, 4])
    latents, sigma = torch.zeros(2, 4, 4, 4), torch.ones(2)
    velocity(forward, latents, sigma, Conditioning(extras={"class_ids": ids}))
    assert torch.equal(forward.arguments[2], ids)
    both = Conditioning(context=torch.zeros(2, 1, 8), extras={"class_ids": ids})
    with pytest.raises(ShapeError, match="class ids must come without a context"):
        velocity(forward, latents, sigma, both)


def test_unknown_condition_is_named() -> None:
    unknown = Conditioning(extras={"guidance": torch.ones(1)})
    with pytest.raises(ShapeError, match=r"must be among .*got \['guidance'\]"):
        velocity(Recorder(), torch.zeros(1, 4, 4, 4), torch.ones(1), unknown)


def test_size_extras_only_where_the_model_reads_them() -> None:
    assert size_extras(PRESETS["demo"], 128, 64) == {}
    assert size_extras(PRESETS["hdm-xut-340m"], 128, 64)["addon_info"].tolist() == pytest.approx([0.6931472])
