"""Stop requests."""

import os
import signal
import time

import pytest

from training.stop import StopFlag, StoppedError


@pytest.mark.skipif(os.name == "nt", reason="os.kill ends the process there")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_sets_the_flag(number: signal.Signals) -> None:
    stop = StopFlag()
    stop.listen()
    stop.check()
    assert not stop
    os.kill(os.getpid(), number)
    assert stop
    with pytest.raises(StoppedError):
        stop.check()


def test_a_time_limit_sets_the_flag() -> None:
    stop = StopFlag(0.01)
    time.sleep(0.02)
    assert stop
    assert not StopFlag(60)
