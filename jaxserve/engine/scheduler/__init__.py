"""Which requests run in the next step, and how many tokens of each."""

from jaxserve.engine.scheduler.scheduler import Scheduler

__all__ = ["Scheduler"]
