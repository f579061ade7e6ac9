"""The order of batches: each sample equally often, one bucket a batch, a pure function of the number."""

from collections import Counter

import pytest

from training.data.order import BatchOrder

CASES = [((5,), 2), ((8,), 8), ((3,), 7), ((5, 9, 1), 4), ((16, 16), 4), ((1,), 1), ((100, 3), 8)]


@pytest.mark.parametrize(("sizes", "batch"), CASES)
def test_batches_are_full_and_hold_samples_of_one_bucket(sizes: tuple[int, ...], batch: int) -> None:
    order = BatchOrder(3, sizes, batch)
    for number in range(60):
        bucket, positions = order.batch(number)
        assert len(positions) == batch
        assert all(0 <= position < sizes[bucket] for position in positions)


@pytest.mark.parametrize(("sizes", "batch"), CASES)
def test_every_sample_is_used_equally_often(sizes: tuple[int, ...], batch: int) -> None:
    order = BatchOrder(3, sizes, batch)
    uses: Counter[tuple[int, int]] = Counter()
    epochs = 24 * batch
    number = 0
    while number < sum(size * epochs // batch for size in sizes):
        bucket, positions = order.batch(number)
        uses.update((bucket, position) for position in positions)
        number += 1
    for bucket, size in enumerate(sizes):
        counts = [uses[bucket, position] for position in range(size)]
        assert max(counts) - min(counts) <= 1
        assert abs(sum(counts) - size * epochs) < batch


def test_samples_of_a_bucket_never_differ_by_more_than_one_use() -> None:
    order = BatchOrder(0, (7, 5), 3)
    uses: Counter[tuple[int, int]] = Counter()
    for number in range(200):
        bucket, positions = order.batch(number)
        uses.update((bucket, position) for position in positions)
        for seen, size in enumerate((7, 5)):
            counts = [uses[seen, position] for position in range(size)]
            assert max(counts) - min(counts) <= 1


def test_a_batch_within_one_round_holds_no_sample_twice() -> None:
    order = BatchOrder(1, (12,), 4)
    for number in range(30):
        _, positions = order.batch(number)
        assert len(set(positions)) == 4


def test_any_batch_can_be_asked_for_first() -> None:
    forward = [BatchOrder(2, (6, 11), 4).batch(number) for number in range(40)]
    backward = [BatchOrder(2, (6, 11), 4).batch(number) for number in reversed(range(40))]
    assert forward == backward[::-1]


def test_a_far_batch_is_found_without_walking_to_it() -> None:
    order = BatchOrder(2, (60_001, 40_003), 16)
    assert order.batch(10_000_000) == order.batch(10_000_000)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    order = BatchOrder(5, (64,), 64)
    epochs = [tuple(order.batch(number)[1]) for number in range(6)]
    assert len(set(epochs)) == 6
    assert {tuple(sorted(epoch)) for epoch in epochs} == {tuple(range(64))}
    assert BatchOrder(6, (64,), 64).batch(0) != order.batch(0)


def test_buckets_take_turns_within_an_epoch() -> None:
    order = BatchOrder(7, (40, 40), 4)
    turns = [order.batch(number)[0] for number in range(20)]
    assert Counter(turns) == {0: 10, 1: 10}
    assert turns != sorted(turns)
