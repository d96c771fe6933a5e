"""Errors of training runs: each names what is wrong and how to mend it."""

from __future__ import annotations

from jaxserve.errors import ConfigError, JaxserveError


class StateMismatch(JaxserveError):
    """Arrays or bytes that are not the state of this run. The message names them."""


class DeviceFault(JaxserveError):
    """A device computes wrongly, again and again. The message names it."""


class TrainConfigError(ConfigError):
    """A field of a training config that cannot work; the message names file, field and fix."""


class RunError(JaxserveError):
    """A run that cannot be started, resumed or asked for something."""


class LedgerError(RunError):
    """A ledger that is not what was written."""


class MemoryFileError(RunError):
    """A snapshot that is not what was written."""


class TrainingFailed(RunError):
    """Trainers failed so often without progress that going on is pointless."""
