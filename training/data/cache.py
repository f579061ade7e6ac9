"""Encoded samples kept in safetensors shards, found again by what was encoded and by which encoder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from training.files import remove_leftovers, rename, save_tensors, sha256, write_atomic, write_failure
from training.locks import locked
from training.stop import StopFlag

Item = TypeVar("Item")
Encoded = dict[str, Tensor]

SHARD_BYTES = 64 << 20
INDEX = "index.jsonl"
LOCK_SECONDS = 600.0


class TensorCache:
    """Tensors by content key. With a folder they outlive the process; without one they live in memory.

    A shard is named after the keys it holds, and the folder is locked while it is read or written, so two
    processes can fill one cache; a killed one loses at most its unfinished shard.
    """

    def __init__(self, folder: Path | None, stop: StopFlag) -> None:
        """Reads what the folder holds; damaged shards are named on stderr and their samples encoded again."""
        self.folder, self.stop = folder, stop
        self.entries: dict[str, Encoded] = {}
        if folder and folder.is_dir():
            with locked(folder, "cache", stop, LOCK_SECONDS):
                remove_leftovers(folder)
                self._read(folder)

    def fill(
        self,
        items: Sequence[tuple[str, Item]],
        encode: Callable[[list[tuple[str, Item]]], Sequence[Encoded | None]],
        *,
        chunk: int,
        what: str,
    ) -> None:
        """Encodes the items (key, content) whose chunk is not complete; None stands for an item to leave out.

        Items are always encoded in the same chunks of `chunk`. Where an item's bits depend on its chunk, its
        key must, too: then a filled cache holds the bits that encoding anew would give.
        """
        chunks = [items[first : first + chunk] for first in range(0, len(items), chunk)]
        open_chunks = [list(c) for c in chunks if any(key not in self.entries for key, _ in c)]
        pending: dict[str, Encoded] = {}
        size = 0
        with tqdm(total=sum(map(len, open_chunks)), desc=what, unit="sample", disable=not open_chunks) as bar:
            for part in open_chunks:
                if self.stop:
                    self._write(pending)
                    self.stop.check()
                for (key, _), tensors in zip(part, encode(part), strict=True):
                    if tensors is None:
                        continue
                    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                    self.entries[key] = pending[key] = kept
                    size += sum(t.nbytes for t in kept.values())
                bar.update(len(part))
                if size > SHARD_BYTES:
                    self._write(pending)
                    pending, size = {}, 0
        self._write(pending)

    def _read(self, folder: Path) -> None:
        """Reads all sound shards; forgets the others, after naming them."""
        index = folder / INDEX
        text = index.read_text(encoding="utf-8", errors="replace") if index.exists() else ""
        sound: dict[str, str] = {}
        damaged: list[str] = []
        for line in text.splitlines():
            try:
                record = json.loads(line)
                name, expected = Path(record["shard"]).name, str(record["sha256"])
            except (json.JSONDecodeError, KeyError, TypeError):
                damaged.append(f"{index}: a damaged line was ignored")
                continue
            if sound.get(name) == line:
                continue
            fault = self._read_shard(folder / name, expected)
            if fault:
                damaged.append(f"{folder / name}: damaged cache file ({fault})")
            else:
                sound[name] = line
        for path in sorted(folder.glob("*.safetensors")):
            if path.name not in sound:
                if not any(str(path) in fault for fault in damaged):
                    damaged.append(f"{index}: does not list {path.name}")
                with contextlib.suppress(OSError):
                    path.unlink()
        if damaged:
            sys.stderr.writelines(f"warning: {fault}; its samples are encoded again\n" for fault in damaged)
            write_atomic(index, "".join(line + "\n" for line in sound.values()))

    def _read_shard(self, path: Path, expected: str) -> str | None:
        """Takes the tensors of a shard; what is wrong with it, if something is."""
        try:
            if sha256(path) != expected:
                return "checksum differs"
            tensors = load_file(path)
        except (OSError, SafetensorError) as err:
            return str(err)
        for name, tensor in tensors.items():
            key, _, part = name.partition(".")
            self.entries.setdefault(key, {})[part] = tensor
        return None

    def _write(self, pending: dict[str, Encoded]) -> None:
        if not self.folder or not pending:
            return
        name = hashlib.sha256("".join(pending).encode()).hexdigest()[:20] + ".safetensors"
        path, aside = self.folder / name, self.folder / f".tmp-{os.getpid()}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with locked(self.folder, "cache", StopFlag(), LOCK_SECONDS):
                save_tensors({f"{key}.{p}": t for key, e in pending.items() for p, t in e.items()}, aside)
                line = json.dumps({"shard": name, "sha256": sha256(aside), "samples": len(pending)}) + "\n"
                rename(aside, path)
                with (self.folder / INDEX).open("a", encoding="utf-8", newline="") as file:
                    file.write(line)
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as err:
            aside.unlink(missing_ok=True)
            raise write_failure(err, path) from err


def content_key(*parts: str | bytes) -> str:
    """Hexadecimal key of contents and settings."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
