"""Errors of a migration."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class MigrationError(ValueError):
    """A migration that was refused or given up. The message says what to do about it."""


class TargetExists(MigrationError):
    """Something is at the target already."""


class MigrationRunning(MigrationError):
    """Another process migrates to the same target."""


class SourceChanged(MigrationError):
    """The source is not what it was when the unfinished migration began."""


class WriteFailed(MigrationError):
    """The system refused to read or write; what was done so far is kept and resumed."""


class VerificationFailed(MigrationError):
    """What was written, read back, is not what was meant. Nothing was published."""


@contextlib.contextmanager
def naming(what: str, done: str) -> Iterator[None]:
    """Turns the system's refusal into WriteFailed, which says what cannot be read or written."""
    try:
        yield
    except OSError as error:
        raise WriteFailed(
            f"{what} cannot be {done}: {error}. What is done is kept: run the same command "
            "again once that is mended"
        ) from error
