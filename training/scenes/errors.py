"""The error that every unusable argument, file or caption of the scenes ends in."""

from flowcore.errors import FlowCoreError


class SceneError(FlowCoreError):
    """A user error about scenes; the message is one line that names the value and the remedy."""
