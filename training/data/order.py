"""Which samples make up batch number k: a pure function of (seed, bucket sizes, batch size, k)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from training.keys import permutation


@dataclass(frozen=True, slots=True)
class BatchOrder:
    """Endless sequence of full batches, one bucket a batch, every sample equally often.

    Each bucket is an endless chain of permutations of its samples, cut into batches, so nothing is dropped.
    Epoch e holds `floor(n(e+1)/B) - floor(ne/B)` batches of a bucket with n samples; the buckets' turns are
    shuffled within the epoch, a bucket's own batches stay in ascending order.
    """

    seed: int
    bucket_sizes: tuple[int, ...]
    batch_size: int

    def batch(self, number: int) -> tuple[int, list[int]]:
        """Bucket and sample numbers within it of batch `number` (from 0)."""
        epoch, offset = self._locate(number)
        turns = _turns(self, epoch)
        bucket = turns[offset]
        ordinal = self._before(bucket, epoch) + sum(1 for turn in turns[:offset] if turn == bucket)
        size = self.bucket_sizes[bucket]
        positions = range(ordinal * self.batch_size, (ordinal + 1) * self.batch_size)
        return bucket, [_round(self.seed, bucket, p // size, size)[p % size] for p in positions]

    def _before(self, bucket: int, epoch: int) -> int:
        """Batches that a bucket has given before an epoch begins."""
        return self.bucket_sizes[bucket] * epoch // self.batch_size

    def _start(self, epoch: int) -> int:
        return sum(self._before(bucket, epoch) for bucket in range(len(self.bucket_sizes)))

    def _locate(self, number: int) -> tuple[int, int]:
        low, high = 0, 1
        while self._start(high) <= number:
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._start(middle) <= number else (low, middle)
        return low, number - self._start(low)


@lru_cache(maxsize=4)
def _turns(order: BatchOrder, epoch: int) -> Sequence[int]:
    """Buckets in the order in which they give batches in one epoch."""
    turns: list[int] = []
    for bucket in range(len(order.bucket_sizes)):
        turns += [bucket] * (order._before(bucket, epoch + 1) - order._before(bucket, epoch))
    return [turns[i] for i in permutation(len(turns), order.seed, "turns", epoch)]


@lru_cache(maxsize=64)
def _round(seed: int, bucket: int, number: int, size: int) -> list[int]:
    return permutation(size, seed, "round", bucket, number)
