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
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        save_file(_separate(tensors), partial, metadata=dict(metadata))
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())  # the library writes files that only their owner can read
        partial.replace(target)
    except (OSError, SafetensorError) as err:
        raise CheckpointError(f"{target} must be writable, got {err}; choose another path") from err
    finally:
        with contextlib.suppress(OSError):  # the folder may be no folder
            partial.unlink(missing_ok=True)


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors on the CPU; copies only of those that have memory in common with another."""
    result = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    end = 0
    for name, tensor in sorted(result.items(), key=lambda item: item[1].data_ptr()):
        if tensor.data_ptr() < end:
            result[name] = tensor.clone()
        else:
            end = tensor.data_ptr() + tensor.nbytes
    return result


def _umask() -> int:
    """Return the permissions that this process withholds from new files."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
