"""Devices and dtypes by name."""

import pytest
import torch

from flowcore.devices import find_device, find_dtype
from flowcore.errors import ConfigError


def test_auto_takes_what_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for cuda, mps, expected in ((True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda answer=cuda: answer)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda answer=mps: answer)
        assert find_device("auto") == torch.device(expected)


def test_absent_and_unknown_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name in ("cuda", "cuda:1", "mps", "tpu", ""):
        with pytest.raises(
            ConfigError, match=rf"device must be auto or one that is present \(cpu\), got '{name}'"
        ):
            find_device(name)
    assert find_device("cpu") == torch.device("cpu")


def test_a_numbered_device_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert find_device("cuda:1") == torch.device("cuda", 1)


def test_dtype_follows_the_device_unless_it_is_named() -> None:
    assert find_dtype("auto", torch.device("cpu")) is torch.float32
    assert find_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert find_dtype("float16", torch.device("cpu")) is torch.float16
    with pytest.raises(ConfigError, match="must be auto or one of float32, bfloat16, float16, got 'half'"):
        find_dtype("half", torch.device("cpu"))
