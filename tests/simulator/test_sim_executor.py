"""Pipeline stages as first-in-first-out servers, on schedules worked out by hand."""

from __future__ import annotations

import pytest

from jaxserve.engine.plan import Chunk, Decodes, StepPlan
from jaxserve.simulator.clock import VirtualClock
from jaxserve.simulator.sim_executor import SimExecutor


def plan(step_id: int, request_id: str = "r") -> StepPlan:
    return StepPlan(step_id, 1, Decodes.of([Chunk(request_id, 0, 5, 1, (), True, ())]), ())


def executor(
    stage_s: dict[int, float], *, num_stages: int, transfer_s: float = 0.0
) -> tuple[SimExecutor, VirtualClock]:
    clock = VirtualClock()
    made = SimExecutor(
        clock,
        lambda plan: (stage_s[plan.step_id], transfer_s),
        num_stages=num_stages,
        record_steps=True,
    )
    return made, clock


def test_one_stage_runs_steps_one_after_another() -> None:
    sim, clock = executor({0: 2.0, 1: 1.0}, num_stages=1)
    sim.submit(plan(0))
    assert not sim.can_accept()
    done, results = sim.next_completion()
    assert (done.step_id, clock.now_s) == (0, 2.0)
    assert results.token_ids.tolist() == [0]
    clock.advance_to(5.0)
    sim.submit(plan(1))
    sim.next_completion()
    assert clock.now_s == 6.0
    with pytest.raises(LookupError):
        sim.next_completion()


def test_uneven_micro_batches_leave_bubbles_in_later_stages() -> None:
    """Two stages. A long step holds up the short one behind it, and the last
    stage idles until the long one comes."""
    sim, clock = executor({0: 1.0, 1: 4.0, 2: 1.0}, num_stages=2)
    sim.submit(plan(0, "a"))  # stage 0: 0-1, stage 1: 1-2
    sim.submit(plan(1, "b"))  # stage 0: 1-5, stage 1: 5-9, which idled 2-5
    sim.next_completion()
    assert clock.now_s == 2.0
    sim.submit(plan(2, "a"))  # stage 0: 5-6, stage 1: 9-10
    assert [step.stage_start_s for step in sim.stats.steps or ()] == [(0, 1), (1, 5), (5, 9)]
    assert sim.stats.request_bubble_s == {"a": 0.0, "b": 3.0}
    assert sim.stats.bubble_s == 3.0
    assert [sim.next_completion()[0].step_id for _ in range(2)] == [1, 2]
    assert clock.now_s == 10.0


def test_equal_micro_batches_leave_none_once_the_pipe_is_full() -> None:
    sim, _ = executor(dict.fromkeys(range(8), 1.0), num_stages=4)
    for step_id in range(8):
        if not sim.can_accept():
            sim.next_completion()
        sim.submit(plan(step_id))
    assert sim.stats.bubble_s == 0.0


def test_hand_over_delays_the_next_stage() -> None:
    sim, clock = executor({0: 1.0}, num_stages=3, transfer_s=0.25)
    sim.submit(plan(0))
    sim.next_completion()
    assert clock.now_s == pytest.approx(3.5)
