"""Write a safetensors file so that readers see the old file or the new one, never a part of it."""

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import CheckpointError


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and string metadata to `path`, making its folder; replace an earlier file in one step.

    Raises: CheckpointError if the file cannot be written; an earlier file then stays as it was.
    """
    target = Path(path)
    partial = target.with_name(f".tmp-{os.getpid()}-{target.name}")
    separate = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(separate, partial, metadata=dict(metadata))
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())  # the library writes files that only their owner can read
        partial.replace(target)
    except (OSError, SafetensorError) as err:
        raise CheckpointError(f"{target} must be writable, got {err}; choose another path") from err
    finally:
        with contextlib.suppress(OSError):  # the folder may be no folder
            partial.unlink(missing_ok=True)


def _umask() -> int:
    """Return the permissions that this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
