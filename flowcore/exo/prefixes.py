"""Prompts and pictures that a model has read before: what it made of the latest of them is kept."""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from ..conditioning import Conditioning

State = TypeVar("State")
KEPT = 4
"""Entries of a cache: with the 8B trunk in bfloat16 each of 1344 tokens takes about 0.36 GB."""


class Recent(Generic[State]):
    """What was made of the latest prompts or pictures, one each; the least recently used leaves first."""

    def __init__(self, kept: int = KEPT) -> None:
        """Keep up to this many."""
        self.kept = kept
        self._states: OrderedDict[Hashable, State] = OrderedDict()

    def __len__(self) -> int:
        """Return how many states there are."""
        return len(self._states)

    def get(self, keys: Sequence[Hashable], read: Callable[[list[int]], list[State]]) -> list[State]:
        """Return the state of each key; read gives those of the rows that are not here, each key once."""
        rows = {key: row for row, key in reversed(list(enumerate(keys))) if key not in self._states}
        missing = sorted(rows.values())
        new = dict(zip((keys[row] for row in missing), read(missing), strict=True)) if missing else {}
        found = {key: new[key] if key in new else self._states[key] for key in keys}
        for key, state in found.items():
            self._states[key] = state
            self._states.move_to_end(key)
        while len(self._states) > self.kept:
            self._states.popitem(last=False)
        return [found[key] for key in keys]

    def clear(self) -> None:
        """Forget all states: for weights that were changed through their `.data`."""
        self._states.clear()


def prompt_keys(told: Conditioning) -> list[Hashable]:
    """Return what tells the prompts of a batch apart: token ids, and the content of their pictures."""
    assert told.context is not None
    ids, mask = told.context[..., 0], told.context_mask
    rows = [row if mask is None else row[mask[i]] for i, row in enumerate(ids)]
    pictures = told.extras.get("pixels")
    grids = told.extras.get("grids")
    return [
        (
            tuple(row.tolist()),
            None if pictures is None else digest(pictures[i]),
            None if grids is None else tuple(grids[i].tolist()),
        )
        for i, row in enumerate(rows)
    ]


def prompt_rows(told: Conditioning, rows: Sequence[int]) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return token ids `b m`, mask, and the patches of the pictures, of some of the prompts."""
    assert told.context is not None
    assert told.context_mask is not None
    index = torch.tensor(rows, device=told.context.device)
    extras = {name: part[index] for name, part in told.extras.items()}
    return told.context[index, :, 0], told.context_mask[index], extras


def weights_key(model: nn.Module) -> Hashable:
    """Return what changes when weights do: their identity, precision, place and count of changes."""
    return tuple((id(p), p.dtype, str(p.device), p._version) for p in model.parameters())


def digest(picture: Tensor) -> bytes:
    """Return what tells the content of pictures of one shape apart."""
    return hashlib.sha256(picture.float().cpu().contiguous().numpy().tobytes()).digest()
