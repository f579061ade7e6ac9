"""Errors that a user can cause and repair.

Every message is one line: `<what> must <rule>, got <value>; <remedy>`.
"""


class FlowCoreError(ValueError):
    """Base of every error that a wrong value, file or shape from outside can cause."""


class ConfigError(FlowCoreError):
    """A setting is unknown, out of range, or contradicts another setting."""


class CheckpointError(FlowCoreError):
    """A weight file is unreadable, incomplete, or belongs to another model."""


class ShapeError(FlowCoreError):
    """A tensor handed to a public function has the wrong axes, size, or type."""
