"""Tensors in weight files, mapped into memory and given back when they are no longer used."""

import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from safetensors import SafetensorError
from torch import Tensor

from ..errors import CheckpointError

Reader: TypeAlias = Callable[[str], Tensor]
_SHARE = 8
"""A file is mapped anew after each such part of it."""


class MappedFile:
    """One file that is mapped into memory.

    What is read of a mapping stays in memory as long as any tensor of it: the file is mapped anew now and
    then, unless the tensor looked up last is still in use.
    """

    def __init__(self, path: Path, open_file: Callable[[Path], Reader]) -> None:
        """Map a file; open_file gives what reads its tensors from a new mapping."""
        self._path, self._open_file = path, open_file
        self._state = self._stamp()
        self._reader = open_file(path)
        self._read = 0
        self._last: Callable[[], Tensor | None] = lambda: None

    def read(self, name: str) -> Tensor:
        """Return a tensor. Raises: CheckpointError if it is unreadable, or the file is another one now."""
        if self._read > self._state[0] // _SHARE and self._last() is None:
            if self._stamp() != self._state:
                raise CheckpointError(
                    f"{self._path} must stay as it is while it is read, got another file in its place; "
                    "load it again"
                )
            self._reader, self._read = self._open_file(self._path), 0
        try:
            tensor = self._reader(name)
        except SafetensorError as err:
            raise CheckpointError(f"{name} in {self._path} must be readable, got {err}") from err
        self._read += tensor.nbytes
        self._last = weakref.ref(tensor)
        return tensor

    def _stamp(self) -> tuple[int, int, int]:
        """Return the size of the file, and what differs in another one of this name."""
        found = self._path.stat()
        return found.st_size, found.st_ino, found.st_mtime_ns


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in one or several files, each read whenever it is looked up."""

    def __init__(self, files: Mapping[str, MappedFile]) -> None:
        """Take the file of each tensor."""
        self.files = files

    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; KeyError if no file has it, CheckpointError as `MappedFile.read`."""
        return self.files[name].read(name)

    def __contains__(self, name: object) -> bool:
        """Return whether a file has a tensor of this name."""
        return name in self.files

    def __iter__(self) -> Iterator[str]:
        """Go through the names."""
        return iter(self.files)

    def __len__(self) -> int:
        """Return the number of tensors."""
        return len(self.files)
