"""When a step counts, and how far trainers may go: pure bookkeeping of one generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxserve.trainer.cadence import Cadence

LOOKAHEAD_STEPS = 2
"""The step under way and the next: trainers need not wait for the supervisor's answer, and
a drain ends after so many steps at most."""


class CommitTracker:
    """What the trainers of one generation have done.

    Attributes:
        committed: next step of the newest complete snapshot; all before it is recoverable.
        committed_slot: the slot that holds it; None: the fresh state, which needs none.
        reached: next step of trainer 0.
        num_lost: steps that were computed and are not committed.
    """

    def __init__(
        self, cadence: Cadence, num_trainers: int, base_step: int, base_slot: int | None
    ) -> None:
        self.committed = base_step
        self.committed_slot = base_slot
        self.reached = base_step
        self._cadence = cadence
        self._num_trainers = num_trainers
        self._pending: dict[int, dict[str, Any]] = {}
        self._stamped: dict[tuple[int, int], set[int]] = {}
        self._pinned: int | None = None
        self._drain_at: int | None = None
        self._run_until = self._allowed()

    @property
    def num_lost(self) -> int:
        return self.reached - self.committed

    @property
    def run_until(self) -> int:
        """Steps below this may be run."""
        return self._run_until

    @property
    def snapshot_until(self) -> int:
        """Snapshots up to this next step may be written. The one after it would overwrite the
        newest complete one, or one that is being saved."""
        protected = self.committed if self._pinned is None else self._pinned
        return self._cadence.snapshot_after(protected)

    def on_step(self, step: int, record: Mapping[str, Any]) -> None:
        """Trainer 0 has computed `step`."""
        if step != self.reached:
            raise ValueError(f"step {step} was computed when step {self.reached} was due")
        self._pending[step] = dict(record)
        self.reached = step + 1
        if self._drain_at is None:
            self._run_until = max(self._run_until, self._allowed())

    def on_snapshot(self, rank: int, slot: int, next_step: int) -> list[dict[str, Any]] | None:
        """Trainer `rank` has written its part. Once all have: the records that this commits."""
        stamped = self._stamped.setdefault((slot, next_step), set())
        stamped.add(rank)
        if len(stamped) < self._num_trainers:
            return None
        del self._stamped[slot, next_step]
        if next_step < self.committed:
            raise ValueError(f"a snapshot before step {next_step} came after {self.committed}")
        self.committed, self.committed_slot = next_step, slot
        steps = sorted(step for step in self._pending if step < next_step)
        return [self._pending.pop(step) for step in steps]

    def pin(self) -> None:
        """The newest snapshot must stay until `unpin`."""
        self._pinned = self.committed

    def unpin(self) -> None:
        """What was pinned may be overwritten."""
        self._pinned = None

    def drain(self) -> int:
        """Permits nothing more. Returns the step before which all will stop."""
        self._drain_at = self._run_until
        return self._run_until

    def _allowed(self) -> int:
        return min(self.reached + LOOKAHEAD_STEPS, self._cadence.total_steps)
