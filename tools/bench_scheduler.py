"""Host cost of the scheduler: plan + commit of decode-only steps, in ms of CPU time.

Beside it what it takes to read the updates that a commit returns, which the engine does when the
device has its next step; and the time of a *bare step*: a loop that only calls a function for each
sequence, which makes a tuple and keeps it. No step in Python can do with less,
so the ratio says what the scheduler adds, whatever the core is worth just now.

Usage: python tools/bench_scheduler.py [--num-seqs 64 256] [--num-steps 400] [--json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import deque

import numpy as np

from jaxserve.engine.plan import StepPlan, StepResults
from jaxserve.engine.request import GenerationRequest, Request
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler

MAX_MODEL_LEN = 2048


def make_decoding_scheduler(num_seqs: int) -> Scheduler:
    """Every slot decodes; positions are spread over the pages' offsets."""
    page_size = 16
    config = SchedulerConfig(
        num_pages=num_seqs * MAX_MODEL_LEN // page_size + num_seqs,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=num_seqs,
        token_budget=2 * num_seqs,
        buckets=(num_seqs, 2 * num_seqs),
        page_size=page_size,
        watermark=0.0,
    )
    scheduler = Scheduler(config)
    for index in range(num_seqs):
        num_prompt = 1 + index % page_size
        generation = GenerationRequest(f"request-{index}", tuple(range(index, index + num_prompt)))
        scheduler.add(
            Request(
                generation=generation,
                max_tokens=MAX_MODEL_LEN - num_prompt,
                seed=index,
                stop_token_ids=frozenset((1 << 20,)),
                arrival_s=float(index),
            )
        )
    while scheduler.num_waiting:
        plan = scheduler.plan(0.0)
        assert plan is not None
        scheduler.commit(plan, results_for(plan), 0.0)
    return scheduler


def results_for(plan: StepPlan) -> StepResults:
    num_rows = plan.num_sample_rows
    return StepResults(
        step_id=plan.step_id,
        token_ids=np.full(num_rows, plan.step_id % 1000, np.int32),
        logprobs=np.zeros(num_rows, np.float32),
        ranks=np.ones(num_rows, np.int32),
        top_ids=np.zeros((num_rows, MAX_TOP_LOGPROBS), np.int32),
        top_logprobs=np.zeros((num_rows, MAX_TOP_LOGPROBS), np.float32),
    )


def measure_decode_steps(num_seqs: int, num_steps: int) -> list[tuple[float, float]]:
    """CPU seconds of plan + commit, and of reading the updates, for each step, with two steps in
    flight.

    CPU time of this thread, so that other work on the machine doesn't count.
    """
    scheduler = make_decoding_scheduler(num_seqs)
    in_flight: deque[tuple[StepPlan, StepResults]] = deque()
    seconds = []
    for _ in range(num_steps):
        start_s = time.thread_time()
        plan = scheduler.plan(0.0)
        planned_s = time.thread_time() - start_s
        assert plan is not None
        assert len(plan.decodes) == num_seqs
        in_flight.append((plan, results_for(plan)))
        if len(in_flight) < scheduler.config.max_in_flight:
            continue
        oldest, results = in_flight.popleft()
        start_s = time.thread_time()
        updates = scheduler.commit(oldest, results, 0.0)
        committed_s = time.thread_time() - start_s
        for _ in updates:
            pass
        read_s = time.thread_time() - start_s - committed_s
        seconds.append((planned_s + committed_s, read_s))
    return seconds


def measure_bare_steps(num_seqs: int, num_steps: int) -> list[float]:
    """CPU seconds of the bare step, once for each of `num_steps`."""
    seconds = []
    for _ in range(num_steps):
        kept: list[tuple[int, int]] = []
        start_s = time.thread_time()
        for index in range(num_seqs):
            _keep(index, kept)
        seconds.append(time.thread_time() - start_s)
    return seconds


def _keep(index: int, kept: list[tuple[int, int]]) -> None:
    kept.append((index, index))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--num-seqs", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    options = parser.parse_args()
    report = {}
    for num_seqs in options.num_seqs:
        bare_ms = statistics.median(measure_bare_steps(num_seqs, options.num_steps)) * 1e3
        steps = measure_decode_steps(num_seqs, options.num_steps)
        times_ms = sorted(step_s * 1e3 for step_s, _ in steps)
        report[str(num_seqs)] = {
            "mean_ms": round(statistics.fmean(times_ms), 4),
            "p50_ms": round(statistics.median(times_ms), 4),
            "p99_ms": round(times_ms[int(0.99 * (len(times_ms) - 1))], 4),
            "read_updates_p50_ms": round(statistics.median(read_s for _, read_s in steps) * 1e3, 4),
            "bare_step_ms": round(bare_ms, 4),
            "p50_in_bare_steps": round(statistics.median(times_ms) / bare_ms, 1),
            "num_steps": len(times_ms),
        }
    if options.json:
        print(json.dumps({"plan_and_commit": report}))
        return
    for num_seqs_text, row in report.items():
        print(f"{num_seqs_text:>5} sequences: " + "  ".join(f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
