"""Tensors that are made when they are looked up: files are renamed and converted without a second copy."""

from collections.abc import Callable, Iterator, Mapping
from operator import itemgetter
from typing import TypeAlias

from torch import Tensor

Maker: TypeAlias = Callable[[Mapping[str, Tensor]], Tensor]
"""Makes a tensor of others."""


class LazyTensors(Mapping[str, Tensor]):
    """Tensors by name, each made of a source whenever it is looked up."""

    def __init__(self, source: Mapping[str, Tensor], makers: Mapping[str, Maker]) -> None:
        """Take the source, and what makes each tensor of it."""
        self._source, self._makers = source, dict(makers)

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; KeyError if it has no maker."""
        return self._makers[name](self._source)

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of this name; none is made."""
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self._makers)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self._makers)

    def outline(self) -> "LazyTensors":
        """Return the tensors on the device "meta": shapes and dtypes, for which no number is read."""
        return LazyTensors(outline(self._source), self._makers)


def renamed(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> LazyTensors:
    """Return tensors under new names; names: new -> present one."""
    return LazyTensors(tensors, {new: itemgetter(old) for new, old in names.items()})


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> LazyTensors:
    """Return the tensors whose names begin with the prefix, under the rest of their names."""
    return renamed(tensors, {name[len(prefix) :]: name for name in tensors if name.startswith(prefix)})


def outline(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the tensors on the device "meta": shapes and dtypes, for which no number is read."""
    if isinstance(tensors, LazyTensors):
        return tensors.outline()
    return {name: tensors[name].to("meta") for name in tensors}
