"""Folders from the Hugging Face hub, where asked for: hub:OWNER/NAME[/FOLDER], or a repository OWNER/NAME."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import CheckpointError

PREFIX = "hub:"
_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?P<folder>(?:/[\w.-]+)*)")
_WANTED = ("*.safetensors", "*.json", "merges.txt")


def is_address(source: str | Path) -> bool:
    """Return whether a source is on the hub."""
    return isinstance(source, str) and source.startswith(PREFIX)


def looks_like_address(source: str | Path) -> bool:
    """Return whether a source might be meant as a repository of the hub, OWNER/NAME."""
    return isinstance(source, str) and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) is not None


def fetch(address: str) -> Path:
    """Return the local folder of an address, downloaded with a progress bar unless it is in the hub's cache.

    Safetensors files, settings and tokenizers alone, of the folder that is named and of its tokenizer. The
    hub's own settings hold: HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE.
    Raises: CheckpointError on one line if the address is none, the hub is out of reach, or lacks such files.
    """
    match = _ADDRESS.fullmatch(address.removeprefix(PREFIX))
    if match is None:
        raise CheckpointError(
            f"a hub address must be hub:OWNER/NAME or hub:OWNER/NAME/FOLDER, got {address!r}"
        )
    folder = match["folder"].strip("/")
    places = [folder, folder.replace("text_encoder", "tokenizer")] if folder else [""]
    wanted = [f"{place}/{name}".lstrip("/") for place in places for name in _WANTED]
    place = download(address, match["repo"], wanted, [] if folder else ["*/*"]) / folder
    if not any(place.glob("*.safetensors")):
        raise CheckpointError(
            f"{address} must hold safetensors files, got none; name the folder of a text encoder in it, "
            "hub:OWNER/NAME/FOLDER, or another repository"
        )
    return place


def find_folder(
    source: str | Path, *, revision: str | None = None, may_download: bool = False, what: str = "trunk"
) -> Path:
    """Return the folder of a checkpoint: the source itself, or that of a repository OWNER/NAME.

    may_download: whether to fetch, with a progress bar, what the hub's cache lacks of it.
    Raises: CheckpointError on one line if it is nowhere; what: the checkpoint's name there.
    """
    if Path(source).is_dir():
        return Path(source)
    found, reason = _snapshot(str(source), revision=revision, local_files_only=not may_download)
    if found is None:
        raise CheckpointError(
            f"the {what} {source} must be a folder, or a repository in the Hugging Face cache, got neither "
            f"({reason}); pass a {what}'s folder or may_download=True"
        )
    return found


def download(address: str, repo: str, wanted: Sequence[str], unwanted: Sequence[str] = ()) -> Path:
    """Return the local copy of a repository's files whose names fit a pattern, in the hub's cache.

    Raises: CheckpointError on one line that names the address, if the hub is out of reach or refuses.
    """
    found, reason = _snapshot(repo, allow_patterns=[*wanted], ignore_patterns=[*unwanted])
    if found is None:
        raise CheckpointError(
            f"{address} must be on the hub and within reach, got {reason}; check name and connection, "
            "log in (hf auth login) if it asks for consent, or pass a local folder or file"
        )
    return found


def _snapshot(repo: str, **options: Any) -> tuple[Path | None, str]:
    """Return the local copy of a repository, or None and why there is none."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        return Path(snapshot_download(repo, **options)), ""
    except (HfHubHTTPError, OSError, ValueError) as err:  # for names, caches and connections
        return None, str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
