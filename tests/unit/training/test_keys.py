"""Keyed randomness."""

import torch

from training.keys import generator, key, permutation


def test_a_key_depends_on_all_it_is_made_of() -> None:
    keys = [
        key(0, "noise"),
        key(1, "noise"),
        key(0, "time"),
        key(0, "noise", 1),
        key(0, "noise", 11),
        key(0, "noise", 1, 1),
    ]
    assert len(set(keys)) == len(keys)
    assert all(0 <= k < 2**63 for k in keys)


def test_keys_are_the_same_on_every_machine() -> None:
    assert key(0, "model", 0) == 9136669263454469677


def test_generators_repeat_and_do_not_touch_the_global_one() -> None:
    before = torch.random.get_rng_state()
    draws = [torch.randn(4, generator=generator(3, "noise", 5)) for _ in range(2)]
    assert torch.equal(*draws)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_permutations_hold_every_number() -> None:
    assert sorted(permutation(50, 0, "round", 2)) == list(range(50))
    assert permutation(50, 0, "round", 2) != permutation(50, 0, "round", 3)
    assert permutation(0, 0, "round") == []
