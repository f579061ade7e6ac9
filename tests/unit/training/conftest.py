"""One thread for each test of the trainer, so that equal runs are equal bit for bit, and signals put back."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.unit.training.workspace import SIZES, run, write_config, write_images

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads, handlers = torch.get_num_threads(), [signal.getsignal(number) for number in SIGNALS]
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    for number, handler in zip(SIGNALS, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a finished run of 4 steps, for tests that only look at it or copy it."""
    folder = tmp_path_factory.mktemp("finished")
    write_images(folder / "images", 9, SIZES)
    path = write_config(
        folder,
        buckets={"resolution": 64, "max_aspect": 2.0},
        logging={"data_order": True},
        cache={"dir": None},
    )
    assert run(path) == 0
    return folder
