"""Encoded samples kept in safetensors shards, found again by what was encoded and by which encoder."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from training.files import remove_leftovers, sha256, sync, write_failure
from training.stop import StopFlag

Item = TypeVar("Item")
Encoded = dict[str, Tensor]

SHARD_BYTES = 64 << 20
INDEX = "index.jsonl"


class TensorCache:
    """Tensors by content key. With a folder they outlive the process; without one they live in memory.

    A shard is named after the keys it holds, so two processes that fill one cache cannot disturb each other, and a
    killed one loses at most its unfinished shard.
    """

    def __init__(self, folder: Path | None) -> None:
        """Reads what the folder holds; damaged shards are named on stderr and their samples encoded again."""
        self.folder = folder
        self.entries: dict[str, Encoded] = {}
        if folder:
            remove_leftovers(folder)
            self._read(folder)

    def fill(
        self,
        items: Sequence[tuple[str, Item]],
        encode: Callable[[list[Item]], list[Encoded]],
        *,
        chunk: int,
        what: str,
        stop: StopFlag,
    ) -> None:
        """Encodes the items (key, content) whose chunk is not complete.

        Items are always encoded in the same chunks of `chunk`, so a filled cache holds the bits that encoding
        anew would give.
        """
        chunks = [items[first : first + chunk] for first in range(0, len(items), chunk)]
        open_chunks = [c for c in chunks if any(key not in self.entries for key, _ in c)]
        pending: dict[str, Encoded] = {}
        size = 0
        with tqdm(total=sum(map(len, open_chunks)), desc=what, unit="sample", disable=not open_chunks) as bar:
            for part in open_chunks:
                if stop:
                    self._write(pending)
                    stop.check()
                for (key, _), tensors in zip(part, encode([item for _, item in part]), strict=True):
                    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                    self.entries[key] = pending[key] = kept
                    size += sum(t.nbytes for t in kept.values())
                bar.update(len(part))
                if size > SHARD_BYTES:
                    self._write(pending)
                    pending, size = {}, 0
        self._write(pending)

    def _read(self, folder: Path) -> None:
        index = folder / INDEX
        if not index.exists():
            return
        for line in index.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                record = json.loads(line)
                self._read_shard(folder / Path(record["shard"]).name, record["sha256"])
            except (json.JSONDecodeError, KeyError, TypeError):
                sys.stderr.write(f"warning: {index}: a damaged line was ignored; its samples are encoded again\n")

    def _read_shard(self, path: Path, expected: str) -> None:
        try:
            if sha256(path) != expected:
                raise SafetensorError("checksum differs")
            tensors = load_file(path)
        except (OSError, SafetensorError) as err:
            sys.stderr.write(f"warning: {path}: damaged cache file ({err}); its samples are encoded again\n")
            return
        for name, tensor in tensors.items():
            key, _, part = name.partition(".")
            self.entries.setdefault(key, {})[part] = tensor

    def _write(self, pending: dict[str, Encoded]) -> None:
        if not self.folder or not pending:
            return
        name = hashlib.sha256("".join(pending).encode()).hexdigest()[:20] + ".safetensors"
        path, aside = self.folder / name, self.folder / f".tmp-{os.getpid()}-{name}"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            save_file({f"{key}.{part}": t for key, entry in pending.items() for part, t in entry.items()}, aside)
            sync(aside)
            line = json.dumps({"shard": name, "sha256": sha256(aside), "samples": len(pending)}) + "\n"
            aside.replace(path)
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
