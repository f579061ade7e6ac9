"""What Exo keeps of prompts and pictures between steps, and what a step yields."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .blocks import KeysValuesPair
from .edit_head import Edit
from .grids import on_grid
from .trunk import KeysValues, Past


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixState:
    """All that does not depend on time, latents and iteration; valid for every step with these prompts.

    Shapes: keep `b p` boolean, which tokens are there; first_position `b`, where suffixes begin; features
    and estimate, the latents they seem to have, `b c h w` of the pictures, None without any; reads: what
    each block of the diffusion head reads.
    """

    past: Past
    reads: tuple[KeysValuesPair, ...]
    keep: Tensor
    first_position: Tensor
    features: Tensor | None
    estimate: Tensor | None
    size: tuple[int, int]

    def map(self, change: Callable[[Tensor], Tensor]) -> "PrefixState":
        """Return a copy with every tensor changed, such as moved to another device."""
        layers = tuple(KeysValues(*map(change, layer)) for layer in self.past.layers)
        return replace(
            self,
            past=Past(layers, self.past.length),
            reads=tuple(KeysValuesPair(*map(change, read)) for read in self.reads),
            keep=change(self.keep),
            first_position=change(self.first_position),
            features=None if self.features is None else change(self.features),
            estimate=None if self.estimate is None else change(self.estimate),
        )

    def repeat(self, batch: int) -> "PrefixState":
        """Return the state of one sample for `batch` of them."""
        return self.map(lambda part: part.repeat_interleave(batch, dim=0))

    def rows(self, start: int, stop: int) -> "PrefixState":
        """Return the state of some of the samples: views, not copies."""
        return self.map(lambda part: part[start:stop])

    def split(self) -> list["PrefixState"]:
        """Return the state of each sample alone, without padding and room; copies, not views."""
        return [self._alone(row) for row in range(len(self.keep))]

    def _alone(self, row: int) -> "PrefixState":
        length = int(self.keep[row].sum())

        def cut(part: Tensor) -> Tensor:
            return part[row : row + 1, :, :length].clone()

        layers = tuple(KeysValues(*map(cut, layer)) for layer in self.past.layers)
        return replace(
            self,
            past=Past(layers, length),
            reads=tuple(KeysValuesPair(*map(cut, read)) for read in self.reads),
            keep=self.keep[row : row + 1, :length].clone(),
            first_position=self.first_position[row : row + 1].clone(),
            features=None if self.features is None else self.features[row : row + 1].clone(),
            estimate=None if self.estimate is None else self.estimate[row : row + 1].clone(),
        )


def join_prefixes(parts: Sequence[PrefixState], *, room: int = 0) -> PrefixState:
    """Return states of one size as that of a batch, padded at the right to the longest prompt.

    room: rows for the suffixes of a step behind each prompt, so that steps need not copy what they add to.
    """
    length = max(part.past.length for part in parts)

    def joined(tensors: Sequence[Tensor], rows: int) -> Tensor:
        return torch.cat([functional.pad(t, (0, 0, 0, rows - t.shape[2])) for t in tensors])

    def used(layer: int, which: int) -> list[Tensor]:
        return [part.past.layers[layer][which][:, :, : part.past.length] for part in parts]

    first = parts[0]
    layers = tuple(
        KeysValues(*(joined(used(layer, which), length + room) for which in (0, 1)))
        for layer in range(len(first.past.layers))
    )
    reads = tuple(
        KeysValuesPair(*(joined([part.reads[block][which] for part in parts], length) for which in (0, 1)))
        for block in range(len(first.reads))
    )
    keep = torch.cat([functional.pad(p.keep, (0, length - p.keep.shape[1])) for p in parts])
    return replace(
        first,
        past=Past(layers, length),
        reads=reads,
        keep=keep,
        first_position=torch.cat([part.first_position for part in parts]),
        features=_joined_pictures([part.features for part in parts], parts),
        estimate=_joined_pictures([part.estimate for part in parts], parts),
    )


def _joined_pictures(found: Sequence[Tensor | None], parts: Sequence[PrefixState]) -> Tensor | None:
    """Return what was made of the pictures of all samples, zero for those without; None without any."""
    like = next((one for one in found if one is not None), None)
    if like is None:
        return None
    empty = [like.new_zeros(len(part.keep), *like.shape[1:]) for part in parts]
    return torch.cat([zeros if one is None else one for one, zeros in zip(found, empty, strict=True)])


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step yields.

    Shapes: velocity, noised, and each of early `b c h w`; time `b`; edits `b (hm wm) k`, the sum of all
    iterations; iterations: the edit of each; early: velocities after iterations but the last, if asked for.
    """

    velocity: Tensor
    noised: Tensor
    time: Tensor
    edits: Tensor
    iterations: tuple[Edit, ...]
    early: tuple[Tensor, ...] = ()

    @property
    def clean(self) -> Tensor:
        """The estimate of the clean latents, z - t v."""
        return self.noised - self._time() * self.velocity

    @property
    def noise(self) -> Tensor:
        """The estimate of the noise, z + (1 - t) v: the epsilon of the description."""
        return self.noised + (1 - self._time()) * self.velocity

    @property
    def mask(self) -> Tensor:
        """The mask of the last iteration, `b hm wm` in 0..1."""
        return on_grid(self.iterations[-1].mask, self.noised.shape[-2:])

    @property
    def sparse_mask(self) -> Tensor:
        """The same with the cells that were not selected at 0."""
        return on_grid(self.iterations[-1].sparse(), self.noised.shape[-2:])

    def _time(self) -> Tensor:
        return self.time.to(self.noised.dtype)[:, None, None, None]
