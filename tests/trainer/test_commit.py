"""Permits and commits: nothing that may still be needed is overwritten, nobody waits forever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxserve.trainer.cadence import Cadence
from jaxserve.trainer.commit import LOOKAHEAD_STEPS, CommitTracker


@dataclass
class Rank:
    """A trainer's loop, one action at a time."""

    step: int
    slot: int = 0
    last: int = -1
    is_stopped: bool = False
    wrote: list[tuple[int, int]] = field(default_factory=list)


class Simulation:
    """Trainers that take turns as a list of numbers says, and a tracker that they tell."""

    def __init__(self, cadence: Cadence, num_ranks: int) -> None:
        self.cadence = cadence
        self.tracker = CommitTracker(cadence, num_ranks, 0, None)
        self.ranks = [Rank(0) for _ in range(num_ranks)]
        self.slots: dict[int, list[int]] = {0: [-1] * num_ranks, 1: [-1] * num_ranks}
        self.drain_at: int | None = None
        self.committed: list[int] = []

    def turn(self, number: int) -> bool:
        """Lets one trainer do what it may. Whether it did something."""
        rank = self.ranks[number % len(self.ranks)]
        due = self.cadence.is_snapshot(rank.step) and rank.last != rank.step and rank.step > 0
        at_end = rank.step in (self.cadence.total_steps, self.drain_at)
        if due or (at_end and rank.last != rank.step):
            return self.snapshot(number % len(self.ranks), rank)
        if at_end or rank.step >= self.tracker.run_until:
            return False
        # The exchange: a step ends only if all ranks have begun it.
        if any(other.step < rank.step for other in self.ranks):
            return False
        rank.step += 1
        if number % len(self.ranks) == 0:
            self.tracker.on_step(rank.step - 1, {"step": rank.step - 1})
        return True

    def snapshot(self, number: int, rank: Rank) -> bool:
        if rank.step > self.tracker.snapshot_until:
            return False
        newest = self.tracker.committed_slot
        assert newest is None or newest != rank.slot, "overwrites the newest snapshot"
        self.slots[rank.slot][number] = rank.step
        records = self.tracker.on_snapshot(number, rank.slot, rank.step)
        if records is not None:
            assert set(self.slots[rank.slot]) == {rank.step}
            self.committed += [record["step"] for record in records]
            assert self.tracker.committed == rank.step
        rank.slot, rank.last = 1 - rank.slot, rank.step
        return True


@given(
    num_ranks=st.integers(1, 5),
    total=st.integers(1, 30),
    snapshot_every=st.integers(1, 7),
    checkpoint_every=st.integers(1, 9),
    turns=st.lists(st.integers(0, 1000), max_size=200),
    drain_after=st.one_of(st.none(), st.integers(0, 60)),
)
def test_any_order_of_trainers(
    num_ranks: int,
    total: int,
    snapshot_every: int,
    checkpoint_every: int,
    turns: list[int],
    drain_after: int | None,
) -> None:
    cadence = Cadence(total, snapshot_every, checkpoint_every)
    simulation = Simulation(cadence, num_ranks)
    for count, number in enumerate(turns):
        if count == drain_after:
            simulation.drain_at = simulation.tracker.drain()
        simulation.turn(number)
        tracker = simulation.tracker
        assert tracker.reached - tracker.committed <= max(snapshot_every, 1) + LOOKAHEAD_STEPS
        assert simulation.committed == list(range(tracker.committed))
    # Fair turns from now on: everybody comes to the end.
    while sum(simulation.turn(number) for number in range(num_ranks)):
        pass
    end = total if simulation.drain_at is None else simulation.drain_at
    assert {rank.step for rank in simulation.ranks} == {end}
    assert simulation.committed == list(range(end))


def test_pinned_snapshot_is_not_overwritten() -> None:
    tracker = CommitTracker(Cadence(100, 1, 10), 1, 0, None)
    for step in range(3):
        tracker.on_step(step, {"step": step})
        tracker.on_snapshot(0, step % 2, step + 1)
    tracker.pin()
    pinned = tracker.committed
    tracker.on_step(3, {"step": 3})
    tracker.on_snapshot(0, 1, 4)
    assert tracker.committed == 4
    assert tracker.snapshot_until == pinned + 1
    tracker.unpin()
    assert tracker.snapshot_until == 5


def test_step_out_of_order_is_refused() -> None:
    tracker = CommitTracker(Cadence(100, 1, 10), 1, 5, 0)
    with pytest.raises(ValueError, match="step 6 was computed when step 5 was due"):
        tracker.on_step(6, {})
