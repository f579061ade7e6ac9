"""Records in safetensors shards with one index; whatever ends the writer, the next one goes on from there.

A record is first a file of its own. When all records of a shard are there, they become the shard, and are
removed; the index is derived from the shards. Equal records give equal files.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from flowcore.errors import ConfigError
from training.data.trajectories import FORMAT, INDEX, name_of
from training.files import remove_leftovers, rename, save_tensors, sha256, write_atomic, write_failure

SHARD_RECORDS = 256
_FREE = ("teacher", "vae", "shards")
"""What may differ from start to start: the names of files, whose contents are known by their hashes."""


@dataclass(frozen=True, slots=True)
class Record:
    """Tensors by name, and the JSON-like facts that the index tells of them."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class Store:
    """A folder that is to hold a number of records of one provenance."""

    def __init__(self, folder: Path, header: Mapping[str, Any], count: int) -> None:
        """Makes the folder, or takes up what an earlier run left in it.

        Raises: ConfigError if that is of another provenance, or more than wanted; RunError if a write fails.
        """
        self.folder, self.count = folder, count
        self.header = {"format": FORMAT, **header}
        self._shards: dict[int, str] = {}
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"{folder} must be a folder, got a file; name another")
        known = self._known()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder)
            for path in sorted(folder.glob("*.safetensors")):
                self._take_up(path, known.get(path.name))
            self._write_index()
        except OSError as err:
            raise write_failure(err, folder) from err
        self.pack()

    def missing(self) -> list[int]:
        """Numbers of the records that are not there yet."""
        return [
            number
            for number in range(self.count)
            if number // SHARD_RECORDS not in self._shards and not self._part(number).exists()
        ]

    def add(self, number: int, record: Record) -> None:
        """Keeps a record. Raises: RunError if the write fails."""
        _save(record.tensors, {"record": json.dumps(record.facts)}, self._part(number))

    def pack(self) -> None:
        """Makes shards of the records whose shard is complete. Raises: RunError if a write fails."""
        for shard in range(-(-self.count // SHARD_RECORDS)):
            numbers = self._numbers(shard)
            if shard not in self._shards:
                if not all(self._part(number).exists() for number in numbers):
                    continue
                self._make_shard(shard)
            for number in numbers:
                self._part(number).unlink(missing_ok=True)

    def _make_shard(self, shard: int) -> None:
        tensors: dict[str, Tensor] = {}
        lines = []
        path = self._shard(shard)
        for number in self._numbers(shard):
            with safe_open(self._part(number), framework="pt") as file:
                facts = json.loads(file.metadata()["record"])
                tensors |= {f"{name_of(number)}.{name}": file.get_tensor(name) for name in list(file.keys())}
            lines.append({"key": name_of(number), "shard": path.name, **facts})
        _save(tensors, {"records": json.dumps(lines)}, path)
        self._shards[shard] = sha256(path)
        self._write_index()

    def _known(self) -> dict[str, str]:
        """Checksums of the shards in the index, after a look at whether it is of this provenance."""
        index = self.folder / INDEX
        if not index.exists():
            names = [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []
            if any(not name.startswith(".tmp") for name in names):
                raise ConfigError(
                    f"{self.folder} must be empty or hold trajectories, got {min(names)}; name another folder"
                )
            return {}
        try:
            found = json.loads(index.read_text(encoding="utf-8").partition("\n")[0])
            shards = dict(found["shards"])
        except (ValueError, KeyError, TypeError) as err:
            raise ConfigError(
                f"{index} must be the index of trajectories, got {err!r}; name another folder"
            ) from err
        for key, value in json.loads(json.dumps(self.header)).items():
            if key not in _FREE and found.get(key) != value:
                raise ConfigError(
                    f"{self.folder} holds trajectories with {key} {_short(found.get(key))}, got "
                    f"{_short(value)}; give the same options, or name another folder"
                )
        return shards

    def _take_up(self, path: Path, expected: str | None) -> None:
        """Accepts a shard of an earlier run; takes it apart if it is to hold more, deletes a damaged one."""
        shard = int(path.stem) if path.stem.isdigit() else -1
        found, records = sha256(path), _read_shard(path)
        if shard < 0 or records is None or expected not in (None, found):
            sys.stderr.write(f"warning: {path}: damaged file; its records are made again\n")
            path.unlink()
            return
        numbers = self._numbers(shard)
        if len(records) > len(numbers):
            held = shard * SHARD_RECORDS + len(records)
            raise ConfigError(
                f"--count must be at least {held}, which {self.folder} holds, got {self.count}; raise it"
            )
        if len(records) == len(numbers):
            self._shards[shard] = found
            return
        for number, record in zip(numbers, records, strict=False):
            self.add(number, record)
        path.unlink()

    def _write_index(self) -> None:
        lines: list[Mapping[str, Any]] = [
            {**self.header, "shards": {self._shard(n).name: self._shards[n] for n in sorted(self._shards)}}
        ]
        for shard in sorted(self._shards):
            with safe_open(self._shard(shard), framework="pt") as file:
                lines += json.loads(file.metadata()["records"])
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_atomic(self.folder / INDEX, text)

    def _numbers(self, shard: int) -> range:
        first = shard * SHARD_RECORDS
        return range(first, min(self.count, first + SHARD_RECORDS))

    def _shard(self, shard: int) -> Path:
        return self.folder / f"{shard:05d}.safetensors"

    def _part(self, number: int) -> Path:
        return self.folder / f".part-{name_of(number)}"


def _save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> None:
    """Writes a file that is complete or absent. Raises: RunError."""
    aside = path.with_name(f".tmp-{os.getpid()}-{path.name}")
    try:
        save_tensors(tensors, aside, metadata)
        rename(aside, path)
    except OSError as err:
        aside.unlink(missing_ok=True)
        raise write_failure(err, path) from err


def _read_shard(path: Path) -> list[Record] | None:
    """The records of a shard, None if it cannot be read."""
    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return [
                Record(
                    {
                        n.partition(".")[2]: file.get_tensor(n)
                        for n in names
                        if n.startswith(line["key"] + ".")
                    },
                    {key: value for key, value in line.items() if key not in ("key", "shard")},
                )
                for line in json.loads(file.metadata()["records"])
            ]
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
