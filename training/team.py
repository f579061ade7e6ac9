"""The processes that train one run together: who they are, and how they agree.

torch is imported by what several processes need of it, so that a signal in the first second is heard.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from flowcore.errors import ConfigError, FlowCoreError
from training.cli import FAILED, STOPPED, ToldError, verdict
from training.files import RunError
from training.processes import end_with
from training.stop import StopFlag, StoppedError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")

WAIT = timedelta(hours=12)
"""How long one process may work alone, such as at a sample grid, while the others wait for it."""


class Team:
    """The processes of a run: here one, which need not agree with any other."""

    rank = 0
    size = 1
    device: torch.device | None = None

    @property
    def is_first(self) -> bool:
        """Whether this process writes the run's files and speaks for all."""
        return self.rank == 0

    def lead(self, work: Callable[[], T]) -> T:
        """What the first process gets of `work`; an error of it is raised in all."""
        return work()

    def each(self, work: Callable[[], T]) -> T:
        """What every process gets of `work` itself; an error in one of them is raised in all."""
        return work()

    def shared(self, err: Exception) -> Exception:
        """An error that every process has found by itself, as the one to raise here: the first tells it."""
        return err

    def stop(self, stop: StopFlag) -> StopFlag:
        """A flag that is set in all processes at once, if all ask at the same points."""
        return stop

    def mean(self, value: Tensor) -> Tensor:
        """The mean over the processes."""
        return value

    def part(self, count: int) -> slice:
        """Which of `count` samples, a multiple of the number of processes, are this process's."""
        own = count // self.size
        return slice(self.rank * own, (self.rank + 1) * own)

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Work with the others: the first process alone writes to stderr, and tells why all end.

        The others have the same progress and warnings to tell; one that has lost the others is not the cause.
        """
        yield

    def leave(self) -> None:
        """Ends the connection to the other processes, when all have done their work."""


class ProcessTeam(Team):
    """Several processes, connected by torch.distributed."""

    def __init__(self) -> None:
        """Joins the processes that the launcher's environment tells of.

        Raises: ModuleNotFoundError without accelerate.
        """
        import torch
        from accelerate import PartialState

        has_cuda = torch.cuda.is_available()
        backend = {"backend": "cpu:gloo,cuda:nccl"} if has_cuda else {}
        state = PartialState(cpu=not has_cuda, timeout=WAIT, **backend)
        self.rank, self.size, self.device = state.process_index, state.num_processes, state.device

    def lead(self, work: Callable[[], T]) -> T:
        """As `Team.lead`; the result is sent, and must be made of what pickle knows."""
        from torch import distributed

        box: list[Any] = [None, None]
        error: Exception | None = None
        if self.is_first:
            box[0], error = _tried(work)
            box[1] = _told(error)
        distributed.broadcast_object_list(box)
        self._raise_first([box[1]], error)
        result: T = box[0]
        return result

    def each(self, work: Callable[[], T]) -> T:
        """As `Team.each`."""
        from torch import distributed

        result, error = _tried(work)
        told: list[Any] = [None] * self.size
        distributed.all_gather_object(told, _told(error))
        self._raise_first(told, error)
        return result

    def _raise_first(self, told: list[tuple[str, int] | None], error: Exception | None) -> None:
        """Raises the first of the processes' errors: its own here, that of another if this one tells it."""
        first = next((one for one in told if one), None)
        if first is None:
            return
        message, code = first
        if code == STOPPED:
            raise StoppedError
        if error and (self.is_first or not message):
            raise error
        if self.is_first and message:
            raise RunError(message) if code == FAILED else ConfigError(message)
        raise ToldError(code)

    def shared(self, err: Exception) -> Exception:
        """As `Team.shared`."""
        return err if self.is_first else ToldError(verdict(err)[1])

    def stop(self, stop: StopFlag) -> StopFlag:
        """As `Team.stop`."""
        return _TeamStop(stop)

    def mean(self, value: Tensor) -> Tensor:
        """As `Team.mean`."""
        from torch import distributed

        total = value.clone()
        distributed.all_reduce(total)
        return total / self.size

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """As `Team.connected`."""
        from torch import distributed

        with silent(is_silent=not self.is_first):
            try:
                yield
            except RuntimeError as err:
                if isinstance(err, distributed.DistError) or "gloo" in str(err):
                    raise ToldError(FAILED) from err
                raise

    def leave(self) -> None:
        """As `Team.leave`."""
        from torch import distributed

        distributed.barrier()
        distributed.destroy_process_group()


class _TeamStop(StopFlag):
    """Set as soon as one process is to stop; asking is work of all processes together."""

    def __init__(self, own: StopFlag) -> None:
        super().__init__()
        self._own = own

    def __bool__(self) -> bool:
        import torch
        from torch import distributed

        if not self.requested:
            flag = torch.tensor([float(bool(self._own))])
            distributed.all_reduce(flag, op=distributed.ReduceOp.MAX)
            self.requested = bool(flag)
        return self.requested


def _tried(work: Callable[[], T]) -> tuple[T, Exception | None]:
    """What `work` gives, or an error that the others hear of; any other ends this process, and so all."""
    try:
        return work(), None
    except (FlowCoreError, StoppedError, ToldError, OSError, MemoryError, RuntimeError, ImportError) as err:
        nothing: Any = None
        return nothing, err


def _told(error: Exception | None) -> tuple[str, int] | None:
    """Message and exit code of an error, for the other processes."""
    if error is None:
        return None
    return ("", STOPPED) if isinstance(error, StoppedError) else verdict(error)


def join(processes: int | None) -> Team:
    """The processes that this one is of, by the environment that launchers set.

    Raises: ConfigError if they are not as many as asked for.
    """
    found = launched_size()
    if processes not in (None, found):
        raise ConfigError(
            f"--processes must be the {found} of the launcher, got {processes}; leave it out or start "
            "without a launcher"
        )
    if found == 1:
        return Team()
    end_with(os.getppid())
    return ProcessTeam()


def launched_rank() -> int:
    """Which of the launched processes this is, from 0."""
    return int(os.environ.get("RANK", "0"))


def launched_size() -> int:
    """Processes that torchrun, accelerate or `--processes` started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextlib.contextmanager
def silent(*, is_silent: bool) -> Iterator[None]:
    """Drops what is written to stderr meanwhile, if it is to be dropped."""
    with contextlib.ExitStack() as held:
        if is_silent:
            nothing = held.enter_context(Path(os.devnull).open("w", encoding="utf-8"))
            held.enter_context(contextlib.redirect_stderr(nothing))
        yield
