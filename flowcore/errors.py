"""Errors that a user can cause and repair.

Every message is one line: `<what> must <rule>, got <value>; <remedy>`.
"""

import contextlib
from collections.abc import Iterator


class FlowCoreError(ValueError):
    """Base of every error that a wrong value, file or shape from outside can cause."""


class ConfigError(FlowCoreError):
    """A setting is unknown, out of range, or contradicts another setting."""


class CheckpointError(FlowCoreError):
    """A weight file is unreadable, incomplete, or belongs to another model."""


class ShapeError(FlowCoreError):
    """A tensor handed to a public function has the wrong axes, size, or type."""


class FlowCoreWarning(UserWarning):
    """A setting does what it says, though not what a user may hope for; one line, as of errors."""


@contextlib.contextmanager
def settings_fit(what: str, kind: str) -> Iterator[None]:
    """Turn whatever transformers raises on settings into a ConfigError: `settings of <what> must fit <kind>`.

    Its checks have error classes that differ between its versions.
    """
    try:
        yield
    except Exception as err:
        raise ConfigError(f"settings of {what} must fit {kind}, got {' '.join(str(err).split())}") from err
