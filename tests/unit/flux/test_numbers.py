"""Samples as text, and back."""

import json

import pytest
import torch

from flowcore.errors import ConfigError
from flowcore.flux import Codec, Patches, Points, Series, Symbols, samples_from_text, samples_to_text

PLANE = Points(count=2, dim=2)


@pytest.mark.parametrize(
    ("text", "codec", "expected"),
    [
        ("[[1, 2], [3, 4.5]]", PLANE, [[[1, 2], [3, 4.5]]]),
        ("[[[1, 2], [3, 4]], [[5, 6], [7, 8]]]", PLANE, [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]),
        ("1 2\n\n3, 4\n", PLANE, [[[1, 2], [3, 4]]]),
        ("1;-2e1\n3;4", PLANE, [[[1, -20], [3, 4]]]),
        ("0 2 1", Symbols(size=3, count=3), [[0, 2, 1]]),
        ("0 2 1\n1 1 1", Symbols(size=3, count=3), [[0, 2, 1], [1, 1, 1]]),
        ("1\n2\n3\n4", Series(window=2, count=4), [[[1], [2], [3], [4]]]),
    ],
)
def test_json_and_rows_are_read(text: str, codec: Codec, expected: list[object]) -> None:
    assert samples_from_text(text, codec).tolist() == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "numbers must be a list in JSON, or as many numbers on every line, got ''"),
        ("1 two", "numbers must be a list in JSON, or as many numbers on every line, got '1 two'"),
        ("1 2\n3", "numbers must be a list in JSON, or as many numbers on every line, got '1 2\\n3'"),
        ("[[1, 2], [3]]", "numbers must be a list in JSON, or as many numbers on every line"),
        ('{"a": 1}', "numbers must be a list in JSON"),
        ("[[1, 2]]", "numbers of this points space must be finite and 2 x 2, or several of these, got 1 x 2"),
        ("1 nan\n2 3", "numbers of this points space must be finite and 2 x 2"),
    ],
)
def test_other_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        samples_from_text(text, PLANE)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "codec", [PLANE, Series(window=2, count=4, colors=3), Patches(patch=1, colors=3, height=2, width=3)]
)
def test_what_is_written_is_read_again(codec: Codec) -> None:
    samples = torch.randn(3, *codec.shape)
    text = samples_to_text(samples, codec)
    assert max(len(part) for part in text.replace("]", ",").split(",")) < 16
    torch.testing.assert_close(samples_from_text(text, codec), samples, rtol=0, atol=1e-6)


def test_symbols_are_written_as_whole_numbers() -> None:
    assert json.loads(samples_to_text(torch.tensor([[0, 2]]), Symbols(size=3, count=2))) == [[0, 2]]
