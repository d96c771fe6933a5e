"""Schedules as text that a reader can check by eye.

Usage: python -m tests.scheduler.timelines writes the goldens anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxserve.engine.plan import StepPlan
from jaxserve.engine.request import GenerationRequest, Request, ServiceObjective
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.policies import POLICIES
from jaxserve.engine.scheduler.scheduler import Scheduler
from tests.scheduler.fake_device import results_of

GOLDENS = Path(__file__).parent / "goldens"
NAMES = "ABCD"


def timeline_config(policy: str, *, num_stages: int) -> SchedulerConfig:
    return SchedulerConfig(
        num_pages=64,
        max_model_len=28,
        max_num_seqs=4,
        token_budget=8,
        buckets=(2, 4, 8, 32),
        page_size=4,
        watermark=0.0,
        max_in_flight=num_stages,
        chain_decodes=num_stages == 1,
        stream_chunks=num_stages > 1,
        prefix_caching=False,
        policy=policy,
    )


def timeline_request(
    name: str, num_prompt: int, max_tokens: int, arrival_s: float = 0.0
) -> Request:
    """D is in more of a hurry than the others, which policies of deadlines follow."""
    first_id = 50 * NAMES.index(name)
    generation = GenerationRequest(
        name,
        tuple(range(first_id, first_id + num_prompt)),
        SamplingParams(temperature=0.0, ignore_eos=True),
        objective=ServiceObjective(ttft_s=3.0, tbt_s=0.1) if name == "D" else None,
    )
    return Request(generation, max_tokens, 0, frozenset(), arrival_s)


def _commit(scheduler: Scheduler, plan: StepPlan, now_s: float) -> None:
    num_rows = plan.num_sample_rows
    scheduler.commit(plan, results_of(plan.step_id, [7] * num_rows, [0.0] * num_rows), now_s)


def plan_cells(plan: StepPlan) -> dict[str, str]:
    cells = {chunk.request_id: "d" for chunk in plan.decodes}
    return cells | {chunk.request_id: f"p{chunk.num_tokens}" for chunk in plan.prefills}


def _row(label: object, cells: Sequence[str]) -> str:
    return f"{label!s:<6}" + "".join(f"{cell:<5}" for cell in cells).rstrip()


def arrivals_beside_decodes(policy: str) -> str:
    """A and B decode; C (14 tokens) and D (5 tokens) arrive after step 0.

    p6: six prompt tokens; d: a decode; -: runs, but not in this step; .: waits.
    """
    scheduler = Scheduler(timeline_config(policy, num_stages=1))
    requests = {name: timeline_request(name, 3, 5) for name in "AB"}
    for request in requests.values():
        scheduler.add(request)
    rows, seen = [_row("step", list(NAMES))], set[str]()
    for step in range(40):
        if step == 1:
            requests |= {"C": timeline_request("C", 14, 2), "D": timeline_request("D", 5, 2)}
            scheduler.add(requests["C"])
            scheduler.add(requests["D"])
        plan = scheduler.plan(float(step))
        if plan is None:
            break
        in_step = plan_cells(plan)
        seen |= set(in_step)
        rows.append(_row(step, [_cell(requests, seen, in_step, name) for name in NAMES]))
        _commit(scheduler, plan, step + 0.5)
    assert not scheduler.has_work
    return "\n".join(rows)


def _cell(requests: dict[str, Request], seen: set[str], in_step: dict[str, str], name: str) -> str:
    if name in in_step:
        return in_step[name]
    if name not in requests or requests[name].finish_reason is not None:
        return ""
    return "-" if name in seen else "."


@dataclass(slots=True)
class _Pipeline:
    """Two stages, each a FIFO; a step takes its rows' number in each, at least 2."""

    stage_free: list[int] = field(default_factory=lambda: [0, 0])
    lanes: list[str] = field(default_factory=lambda: ["", ""])

    def run(self, plan: StepPlan, now: int) -> int:
        """Returns when it leaves the last stage."""
        label = "0123456789abcdefghijklmnopqrstuvwxyz"[plan.step_id]
        duration = max(2, plan.num_tokens)
        for stage in range(2):
            now = max(now, self.stage_free[stage])
            self.lanes[stage] = self.lanes[stage].ljust(now, ".") + label * duration
            now += duration
            self.stage_free[stage] = now
        return now


def two_stages(policy: str) -> str:
    """A to D arrive together; two pipeline stages, chunks stream through them.

    Below the steps: which step each stage runs, a column per unit of time.
    """
    scheduler = Scheduler(timeline_config(policy, num_stages=2))
    for name, num_prompt in zip(NAMES, (16, 5, 12, 3), strict=True):
        scheduler.add(timeline_request(name, num_prompt, 3))
    pipeline, now = _Pipeline(), 0
    in_flight: list[tuple[StepPlan, int]] = []
    rows = [_row("step", list(NAMES))]
    while scheduler.has_work:
        plan = scheduler.plan(float(now))
        if plan is not None:
            in_flight.append((plan, pipeline.run(plan, now)))
            cells = plan_cells(plan)
            rows.append(_row(plan.step_id, [cells.get(name, "") for name in NAMES]))
            continue
        oldest, done = in_flight.pop(0)
        now = max(now, done)
        _commit(scheduler, oldest, float(now))
    end = max(len(lane) for lane in pipeline.lanes)
    rows += [f"stage {i} |{lane.ljust(end, '.')}|" for i, lane in enumerate(pipeline.lanes)]
    idle = sum(lane.ljust(end, ".").count(".") for lane in pipeline.lanes)
    return "\n".join([*rows, f"idle {idle} of {2 * end}"])


FIGURES: dict[str, Callable[[str], str]] = {
    "arrivals_beside_decodes": arrivals_beside_decodes,
    "two_stages": two_stages,
}


def read_goldens(figure: str) -> dict[str, str]:
    """Policy -> its timeline."""
    sections = (GOLDENS / f"{figure}.txt").read_text("utf-8").rstrip("\n").split("\n\n")
    return dict(section.removeprefix("== ").split("\n", 1) for section in sections)


def main() -> None:
    for figure, draw in FIGURES.items():
        text = "\n\n".join(f"== {policy}\n{draw(policy)}" for policy in POLICIES)
        (GOLDENS / f"{figure}.txt").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
