"""What Exo keeps of prompts and pictures between steps, and what a step yields."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from einops import rearrange
from torch import Tensor

from .blocks import KeysValuesPair
from .edit_head import Edit
from .grids import memory_grid
from .trunk import KeysValues, Past


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixState:
    """All that does not depend on time, latents and iteration; valid for every step with these prompts.

    Shapes: keep `b p` boolean, which tokens are there; first_position `b`, where suffixes begin; features
    `b c h w` of the pictures, None without any; reads: what each block of the diffusion head reads.
    """

    past: Past
    reads: tuple[KeysValuesPair, ...]
    keep: Tensor
    first_position: Tensor
    features: Tensor | None
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
        )

    def repeat(self, batch: int) -> "PrefixState":
        """Return the state of one sample for `batch` of them."""
        return self.map(lambda part: part.repeat_interleave(batch, dim=0))


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
        return self._on_grid(self.iterations[-1].mask)

    @property
    def sparse_mask(self) -> Tensor:
        """The same with the cells that were not selected at 0."""
        return self._on_grid(self.iterations[-1].sparse())

    def _time(self) -> Tensor:
        return self.time.to(self.noised.dtype)[:, None, None, None]

    def _on_grid(self, mask: Tensor) -> Tensor:
        rows, _ = memory_grid(*self.noised.shape[-2:])
        return rearrange(mask, "b (h w) -> b h w", h=rows)
