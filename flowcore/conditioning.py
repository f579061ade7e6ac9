"""What a model is told besides the noised latents: text tokens, their mask, one vector, and named extras."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional

from .errors import ShapeError


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditioning:
    """One batch of conditions. Every tensor has the batch axis first; absent parts are None.

    Shapes: context `b m d`; context_mask `b m` boolean, True = real token; pooled `b d`; extras by the names
    that the architecture gives them.
    """

    context: Tensor | None = None
    context_mask: Tensor | None = None
    pooled: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def batch(self) -> int | None:
        """The batch size, or None when no part is present."""
        sizes = [
            part.shape[0] for part in (self.context, self.pooled, *self.extras.values()) if part is not None
        ]
        return sizes[0] if sizes else None

    def to(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> "Conditioning":
        """Return a copy on the device, with floating-point tensors in dtype; None leaves either as it is."""

        def move(part: Tensor) -> Tensor:
            return part.to(device=device, dtype=dtype if part.is_floating_point() else None)

        return self._map(move)

    def expand(self, batch: int) -> "Conditioning":
        """Return the conditions repeated from batch 1 to `batch` (views, not copies).

        Raises: ShapeError if a part has a batch size other than 1 and `batch`.
        """

        def grow(part: Tensor) -> Tensor:
            if part.shape[0] not in (1, batch):
                raise ShapeError(f"the batch of a condition must be 1 or {batch}, got {part.shape[0]}")
            return part.expand(batch, *part.shape[1:])

        return self._map(grow)

    def cut(self, length: int) -> "Conditioning":
        """Return a copy whose context has at most `length` tokens, the first ones."""
        context, mask = (
            None if part is None else part[:, :length] for part in (self.context, self.context_mask)
        )
        return replace(self, context=context, context_mask=mask)

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Return a copy with every present tensor changed."""
        context, mask, pooled = (
            None if part is None else change(part) for part in (self.context, self.context_mask, self.pooled)
        )
        extras = {name: change(part) for name, part in self.extras.items()}
        return replace(self, context=context, context_mask=mask, pooled=pooled, extras=extras)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextShape:
    """What a model reads of a text.

    width: of a token's state; None = it reads no text. length: the most tokens; longer texts are cut, and
    shorter ones padded where the encoder's recipe counts padding as text. pooled: width of the vector of the
    whole text; None = it reads none. needs_pooled: whether it must be given one. masks_padding: whether the
    attention of a T5 encoder leaves padding out.
    """

    width: int | None
    length: int
    pooled: int | None = None
    needs_pooled: bool = False
    masks_padding: bool = True


def zeroed(conditioning: Conditioning) -> Conditioning:
    """Return the conditions with zeros as text and as pooled vector: how some models are told nothing."""
    context, pooled = (
        None if part is None else torch.zeros_like(part)
        for part in (conditioning.context, conditioning.pooled)
    )
    return replace(conditioning, context=context, pooled=pooled)


def cat(items: Sequence[Conditioning]) -> Conditioning:
    """Return the conditions joined along the batch axis.

    Contexts of different lengths are padded with zero rows to the longest; a mask says which rows are real.
    Raises: ShapeError if no item is given, or if a part is present in some items only.
    """
    if not items:
        raise ShapeError("conditions to join must be at least one, got none")
    if len(items) == 1:
        return items[0]
    names = list(items[0].extras)
    if any(set(item.extras) != set(names) for item in items):
        raise ShapeError(
            f"conditions to join must have the same extras, got {[sorted(i.extras) for i in items]}"
        )
    context, mask = _cat_contexts(items)
    return Conditioning(
        context=context,
        context_mask=mask,
        pooled=_cat_present("pooled vector", [item.pooled for item in items]),
        extras={name: torch.cat([item.extras[name] for item in items]) for name in names},
    )


def _cat_present(what: str, parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return the parts joined, or None when all are absent."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    if len(present) != len(parts):
        raise ShapeError(
            f"the {what} must be present in all conditions to join or in none, got {len(present)}"
        )
    return torch.cat(present)


def _cat_contexts(items: Sequence[Conditioning]) -> tuple[Tensor | None, Tensor | None]:
    """Return the joined contexts and their mask; no mask when all lengths are equal and no item has one."""
    present = [item for item in items if item.context is not None]
    contexts = [item.context for item in present if item.context is not None]
    if len(contexts) not in (0, len(items)):
        raise ShapeError(
            f"the context must be present in all conditions to join or in none, got {len(contexts)}"
        )
    if not contexts:
        return None, None
    longest = max(context.shape[1] for context in contexts)
    padded = torch.cat([functional.pad(c, (0, 0, 0, longest - c.shape[1])) for c in contexts])
    if all(c.shape[1] == longest for c in contexts) and all(item.context_mask is None for item in items):
        return padded, None
    masks = [_full_mask(item.context_mask, c, longest) for item, c in zip(present, contexts, strict=True)]
    return padded, torch.cat(masks)


def _full_mask(mask: Tensor | None, context: Tensor, length: int) -> Tensor:
    """Return the item's mask, or all True, padded with False to `length` tokens."""
    if mask is None:
        mask = torch.ones(context.shape[:2], dtype=torch.bool, device=context.device)
    return functional.pad(mask, (0, length - mask.shape[1]), value=False)
