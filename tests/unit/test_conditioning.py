"""Joining, repeating and moving conditions."""

import pytest
import torch

from flowcore.conditioning import Conditioning, cat, zeroed
from flowcore.errors import FlowCoreError, ShapeError


def test_joined_contexts_are_padded_and_masked() -> None:
    joined = cat([Conditioning(context=torch.ones(1, 3, 2)), Conditioning(context=torch.ones(2, 5, 2))])
    assert joined.context is not None
    assert joined.context_mask is not None
    assert joined.batch == 3
    assert joined.context[0, 3:].abs().sum() == 0
    assert joined.context_mask.sum(dim=1).tolist() == [3, 5, 5]


def test_equal_lengths_need_no_mask_and_masks_are_kept() -> None:
    plain = Conditioning(context=torch.ones(1, 3, 2))
    assert cat([plain, plain]).context_mask is None
    masked = Conditioning(context=torch.ones(1, 3, 2), context_mask=torch.tensor([[True, False, False]]))
    joined = cat([plain, masked])
    assert joined.context_mask is not None
    assert joined.context_mask.tolist() == [[True] * 3, [True, False, False]]
    assert cat([masked]) is masked


def test_extras_and_pooled_are_joined() -> None:
    item = Conditioning(pooled=torch.ones(1, 4), extras={"r": torch.zeros(1)})
    joined = cat([item, item])
    assert joined.pooled is not None
    assert (joined.pooled.shape, joined.extras["r"].shape) == ((2, 4), (2,))


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([], "must be at least one"),
        ([Conditioning(), Conditioning(extras={"r": torch.zeros(1)})], "must have the same extras"),
        (
            [Conditioning(), Conditioning(pooled=torch.zeros(1, 2))],
            "the pooled vector must be present in all",
        ),
        ([Conditioning(), Conditioning(context=torch.zeros(1, 2, 2))], "the context must be present in all"),
    ],
)
def test_conditions_that_do_not_fit(items: list[Conditioning], message: str) -> None:
    with pytest.raises(ShapeError, match=message):
        cat(items)


def test_expand_repeats_one_and_refuses_others() -> None:
    item = Conditioning(context=torch.ones(1, 2, 3), extras={"r": torch.zeros(1)})
    grown = item.expand(4)
    assert grown.context is not None
    assert (grown.context.shape, grown.extras["r"].shape, grown.batch) == ((4, 2, 3), (4,), 4)
    assert item.batch == 1
    with pytest.raises(ShapeError, match="must be 1 or 3, got 4"):
        grown.expand(3)
    assert Conditioning().batch is None


def test_dtype_changes_only_floating_point_parts() -> None:
    mask, ids = torch.ones(1, 2, dtype=torch.bool), torch.tensor([3])
    item = Conditioning(context=torch.ones(1, 2, 3), context_mask=mask, extras={"class_ids": ids})
    moved = item.to("cpu", torch.bfloat16)
    assert moved.context is not None
    assert moved.context_mask is not None
    assert moved.context.dtype == torch.bfloat16
    assert (moved.context_mask.dtype, moved.extras["class_ids"].dtype) == (torch.bool, torch.int64)


def test_errors_are_value_errors() -> None:
    assert issubclass(ShapeError, FlowCoreError)
    assert issubclass(FlowCoreError, ValueError)


def test_a_cut_keeps_the_first_tokens_and_everything_else() -> None:
    given = Conditioning(
        context=torch.arange(6.0).reshape(1, 3, 2),
        context_mask=torch.tensor([[True, True, False]]),
        pooled=torch.ones(1, 4),
    )
    cut = given.cut(2)
    assert cut.context is not None
    assert cut.context_mask is not None
    assert cut.context.tolist() == [[[0, 1], [2, 3]]]
    assert cut.context_mask.tolist() == [[True, True]]
    assert cut.pooled is given.pooled
    assert Conditioning().cut(2).context is None


def test_zeroed_conditions_keep_their_shapes_masks_and_extras() -> None:
    given = Conditioning(
        context=torch.ones(1, 3, 2),
        context_mask=torch.ones(1, 3, dtype=torch.bool),
        pooled=torch.ones(1, 4),
        extras={"r": torch.ones(1)},
    )
    null = zeroed(given)
    assert null.context is not None
    assert null.pooled is not None
    assert (null.context.shape, null.pooled.shape) == ((1, 3, 2), (1, 4))
    assert not null.context.any()
    assert not null.pooled.any()
    assert null.context_mask is given.context_mask
    assert null.extras["r"] is given.extras["r"]
    assert zeroed(Conditioning()) == Conditioning()
