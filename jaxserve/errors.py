"""Errors that a person reads: each names what is wrong and how to mend it.

Front ends print or send these without a traceback; any other exception is a
defect of ours.
"""

from __future__ import annotations


class JaxserveError(Exception):
    """A problem that the user can mend. The message holds the fix."""


class ConfigError(JaxserveError):
    """A start-up setting that cannot work. The message names the flag."""


class InvalidRequest(JaxserveError):
    """A request field that cannot be served.

    Args:
        field: the field's name as the client wrote it, e.g. `sampling.top_p`.
        message: what is wrong and what would be right.
    """

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}")
        self.field = field


class ConstraintFailed(InvalidRequest):
    """A constraint that came to a limit in the middle of its answer.

    Args:
        why: the limit.
    """

    def __init__(self, why: str) -> None:
        super().__init__("constraint", f"the answer cannot go on in the form asked for: {why}")


class QueueFull(JaxserveError):
    """The bounded queue has no room; the client should retry later."""

    retry_after_s: float = 1.0


class OverLimit(QueueFull):
    """A tenant has used what it may; others are served.

    Args:
        limit: its name in the keys file.
        retry_after_s: when there may be room again.
    """

    def __init__(self, limit: str, message: str, retry_after_s: float) -> None:
        super().__init__(f"{message} ({limit}): retry later")
        self.limit = limit
        self.retry_after_s = retry_after_s


class Unauthenticated(JaxserveError):
    """No API key came with the request, or one that is not known."""


class Forbidden(JaxserveError):
    """The API key is known, but not good for this."""


class NotAccepting(JaxserveError):
    """The engine drains or has stopped and takes no new requests."""


class EngineLost(NotAccepting):
    """What a running request needed is gone, such as a process that holds a part of the model.
    Another server may take it."""


class OutOfMemory(EngineLost):
    """The device had no memory to go on with a running request."""


class NotSupported(JaxserveError):
    """The model that runs cannot do what was asked; another kind of model can."""


class NotFound(JaxserveError):
    """Nothing of the caller's has this name."""


class AdapterNotFound(NotFound):
    """No adapter of this name is loaded."""


class NoRoomForAdapter(JaxserveError):
    """Every place for adapters has one, or requests that still run on one."""


class StreamTooSlow(JaxserveError):
    """A client reads its stream slower than tokens are made; it was cancelled."""
