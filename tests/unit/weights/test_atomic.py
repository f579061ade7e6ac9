"""Files of tensors that lie in each other's memory."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from flowcore.weights.atomic import write_tensors


def test_shared_memory_is_written_for_each_tensor(tmp_path: Path) -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "all": matrix,
        "again": matrix,
        "rows": matrix[1:],
        "last": matrix[2],
        "turned": matrix.T,
        "none": matrix[:0],
        "scalar": torch.tensor(3.0),
        "broadcast": torch.ones(1, 3).expand(2, 3),
    }
    write_tensors(tmp_path / "a.safetensors", tensors, {})
    found = load_file(tmp_path / "a.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
