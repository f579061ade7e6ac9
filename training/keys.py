"""Keyed randomness: every draw of a run is a function of (seed, name, numbers), never of what ran before it.

So a resumed run, another number of processes or another micro-batch sees the same order, noise and times.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Generator


def key(seed: int, name: str, *numbers: int) -> int:
    """63-bit integer determined by the seed, a stream's name and the position in it."""
    text = ":".join([str(seed), name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, name: str, *numbers: int) -> Generator:
    """CPU generator seeded with `key(seed, name, *numbers)`."""
    return Generator().manual_seed(key(seed, name, *numbers))


def permutation(count: int, seed: int, name: str, *numbers: int) -> list[int]:
    """Random order of 0..count-1 that depends on the key alone."""
    return torch.randperm(count, generator=generator(seed, name, *numbers)).tolist()
