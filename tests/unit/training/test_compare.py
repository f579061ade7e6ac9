"""The judge's table."""

import pytest

from training.compare import title


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("xut-demo", "xut-demo"),
        ("runs/demo/flux-demo/model.safetensors", "flux-demo"),
        ("model.safetensors", "model"),
        ("runs/mine.safetensors", "mine"),
    ],
)
def test_a_model_is_called_after_what_tells_it_from_others(name: str, expected: str) -> None:
    assert title(name) == expected
