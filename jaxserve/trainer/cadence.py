"""When a run takes snapshots, checkpoints and evaluations: pure functions of the step."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Cadence:
    """All counts are of steps done, so n means: before step n (from 0).

    Attributes:
        total_steps: length of the run.
        snapshot_every: into shared memory.
        checkpoint_every: onto the disk; from a snapshot, which is taken then in any case.
        evaluate_every: of the evaluation loss; None: never.
    """

    total_steps: int
    snapshot_every: int
    checkpoint_every: int
    evaluate_every: int | None = None

    def is_snapshot(self, next_step: int) -> bool:
        """Whether a snapshot is due when `next_step` steps are done."""
        return (
            next_step % self.snapshot_every == 0
            or next_step % self.checkpoint_every == 0
            or next_step == self.total_steps
        )

    def is_checkpoint(self, next_step: int) -> bool:
        """Whether a durable checkpoint is due when `next_step` steps are done."""
        return next_step % self.checkpoint_every == 0 or next_step == self.total_steps

    def is_evaluation(self, next_step: int) -> bool:
        """Whether the evaluation loss is due when `next_step` steps are done."""
        every = self.evaluate_every
        return every is not None and (next_step % every == 0 or next_step == self.total_steps)

    def snapshot_after(self, next_step: int) -> int:
        """The first snapshot after the one at `next_step`."""
        later = next_step + 1
        candidates = (
            -(-later // self.snapshot_every) * self.snapshot_every,
            -(-later // self.checkpoint_every) * self.checkpoint_every,
        )
        return min(*candidates, self.total_steps) if later <= self.total_steps else later

    def to_json(self) -> dict[str, int | None]:
        """Its fields as JSON values."""
        return asdict(self)
