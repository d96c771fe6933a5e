"""Errors of the checkpoint store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MAX_PROBLEMS_IN_ERROR = 8


class StoreError(ValueError):
    """The root of the store's errors. Every message says what to do about it."""


class StoreNotFound(StoreError):
    """A reader was pointed at a folder that is no checkpoint store."""


class StepNotFound(StoreError):
    """The store has no such step."""


class StepExists(StoreError):
    """A save would not be the newest step of the store."""


class UnsupportedLeaf(StoreError):
    """A leaf that the store cannot keep: a string, an object, a foreign dtype."""


class TreeMismatch(StoreError):
    """The tree asked for has other leaves, shapes or dtypes than the checkpoint."""


class NoGoodStep(StoreError):
    """There were checkpoints, and none of them is whole.

    Training from scratch would silently throw the run away, so whoever wants
    that must decide it.
    """


class SaveFailed(StoreError):
    """A save that did not become a checkpoint. Earlier steps are as they were."""


class SaveTimedOut(SaveFailed):
    """A save that was given up after `save_timeout_s`."""


class LeaseHeld(StoreError):
    """Another writer holds the store."""


class Fenced(SaveFailed):
    """This writer has lost the store to one with a newer epoch. Nothing it does counts."""


class StoreUnreadable(StoreError):
    """The system refuses to read (permissions, open files, memory): no proof of damage."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a stored step.

    Attributes:
        where: file relative to the step's folder, or `array NAME`.
        what: what was expected and what was found.
    """

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


class CorruptStep(StoreError):
    """A stored step that is not what was saved. None of its values was handed out.

    Attributes:
        step: the step.
        problems: what is wrong, at least one.
    """

    def __init__(self, step: int, problems: Sequence[Problem], note: str = "") -> None:
        self.step = step
        self.problems = tuple(problems)
        shown = "; ".join(str(problem) for problem in self.problems[:MAX_PROBLEMS_IN_ERROR])
        hidden = len(self.problems) - MAX_PROBLEMS_IN_ERROR
        more = f"; and {hidden} more" if hidden > 0 else ""
        super().__init__(f"step {step} is corrupt: {shown}{more}{note}")
