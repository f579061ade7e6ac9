"""What visual tokens are taught of words and places."""

import math

import pytest
import torch

from training.keys import generator
from training.objectives.language import CaptionWords, place_loss


def test_places_are_read_from_states_that_tell_them() -> None:
    """Of a grid that is not square; states that repeat the heads of their place are read without error."""
    rows, columns, width = 2, 3, 512
    heads = torch.randn(rows + columns, width, generator=generator(7, "place"))
    tokens = torch.stack(
        [heads[row] + heads[rows + column] for row in range(rows) for column in range(columns)]
    )
    assert float(place_loss(tokens[None], (rows, columns), 7)) < 1e-3
    blind = torch.zeros(2, rows * columns, width)
    assert float(place_loss(blind, (rows, columns), 7)) == pytest.approx(math.log(rows) + math.log(columns))
    turned = tokens.reshape(rows, columns, width).transpose(0, 1).reshape(1, -1, width)
    assert float(place_loss(turned, (rows, columns), 7)) > 1


def test_words_that_all_captions_hold_are_worth_nothing() -> None:
    words = CaptionWords([[1, 2, 2], [1, 3]], 5, torch.device("cpu"))
    assert words.worth.tolist() == pytest.approx([math.log(3), 0, math.log(1.5), math.log(1.5), math.log(3)])
    table = torch.eye(5)
    common, rare = (torch.zeros(1, 1, 5).index_fill(2, torch.tensor([word]), 9.0) for word in (1, 2))
    assert float(words.loss(rare, table, [[1, 2]])) < 0.01 < float(words.loss(common, table, [[1, 2]]))
    assert float(words.loss(rare, table, [[]])) == 0
