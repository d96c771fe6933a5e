"""What goes wrong with schedules."""

from __future__ import annotations


class ScheduleError(ValueError):
    """A schedule that cannot be built or used as asked; the message says how to mend it."""
