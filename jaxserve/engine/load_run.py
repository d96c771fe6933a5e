"""A closed-loop load on an engine, and what it measured."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.metrics import StepRecord
from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput

# More steps than any run has; they are kept only while it lasts.
_NUM_STEPS_KEPT = 1 << 20
# A step whose results come this fast was done before the loop asked for it.
_READY_AT_ONCE_S = 0.0001


@dataclass(slots=True)
class RequestTimes:
    """When one request's tokens reached its reader."""

    added_s: float
    token_times_s: list[float] = field(default_factory=list)
    """One entry a token."""
    num_prompt_tokens: int = 0
    finish_reason: FinishReason | None = None

    @property
    def ttft_s(self) -> float:
        return self.token_times_s[0] - self.added_s

    @property
    def e2e_s(self) -> float:
        return self.token_times_s[-1] - self.added_s

    @property
    def inter_token_s(self) -> list[float]:
        """Between neighbouring tokens; nothing for the first one."""
        return np.diff(self.token_times_s).tolist()


@dataclass(frozen=True, slots=True)
class LoadRun:
    """What a run measured. `summary` makes plain numbers of it."""

    requests: Sequence[RequestTimes]
    steps: Sequence[StepRecord]
    elapsed_s: float
    num_compiles: int
    num_preemptions: int

    def summary(self) -> dict[str, object]:
        """Figures for people and JSON; units are in the names.

        A *host gap* is the time for which nothing was in flight, with work at
        hand, before a step was submitted (`StepRecord.host_gap_s`: 0 if another
        step was in flight then); `host_gap_fraction` is that over the step's own
        time, step by step. With two steps in flight a slow host shows up first
        in `steps_ready_at_once_fraction`: results that were waiting when the
        loop came for them. TPOT is a request's mean time a token after its
        first, ITL the time between two neighbouring tokens.
        """
        ok = [r for r in self.requests if r.token_times_s]
        num_output_tokens = sum(len(r.token_times_s) for r in ok)
        num_prompt_tokens = sum(r.num_prompt_tokens for r in ok)
        itl_s = [value for r in ok for value in r.inter_token_s]
        tpot_s = [float(np.mean(r.inter_token_s)) for r in ok if r.inter_token_s]
        steps = self.steps
        gaps_s = [step.host_gap_s for step in steps]
        num_rows = sum(step.num_rows_bucket for step in steps)
        ready_at_once = sum(step.device_wait_s < _READY_AT_ONCE_S for step in steps)
        return {
            "num_requests": len(self.requests),
            "num_failed": len(self.requests) - len(self._finished()),
            "elapsed_s": self.elapsed_s,
            "num_prompt_tokens": num_prompt_tokens,
            "num_output_tokens": num_output_tokens,
            "requests_per_s": len(ok) / self.elapsed_s,
            "output_tokens_per_s": num_output_tokens / self.elapsed_s,
            "total_tokens_per_s": (num_prompt_tokens + num_output_tokens) / self.elapsed_s,
            "ttft_ms": percentiles([1e3 * r.ttft_s for r in ok]),
            "tpot_ms": percentiles([1e3 * value for value in tpot_s]),
            "itl_ms": percentiles([1e3 * value for value in itl_s]),
            "e2e_ms": percentiles([1e3 * r.e2e_s for r in ok]),
            "num_steps": len(steps),
            "step_ms": percentiles([1e3 * step.step_s for step in steps]),
            "steps_by_bucket": self._steps_by_bucket(),
            "mean_step_fill": sum(s.num_tokens for s in steps) / num_rows if num_rows else 0.0,
            "host_gap_ms": percentiles([1e3 * gap for gap in gaps_s]),
            "host_gap_fraction": percentiles(
                [step.host_gap_s / step.step_s for step in steps if step.step_s > 0]
            ),
            "steps_ready_at_once_fraction": ready_at_once / len(steps) if steps else 0.0,
            "num_preemptions": self.num_preemptions,
            "compiles_after_ready": self.num_compiles,
        }

    def _finished(self) -> list[RequestTimes]:
        good = (FinishReason.LENGTH, FinishReason.STOP)
        return [r for r in self.requests if r.finish_reason in good]

    def _steps_by_bucket(self) -> Mapping[str, int]:
        buckets = sorted({step.num_rows_bucket for step in self.steps})
        return {
            str(bucket): sum(step.num_rows_bucket == bucket for step in self.steps)
            for bucket in buckets
        }


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """Mean, P50, P90 and P99; None of nothing."""
    if not values:
        return None
    p50, p90, p99 = np.percentile(values, (50, 90, 99)).tolist()
    return {"mean": float(np.mean(values)), "p50": p50, "p90": p90, "p99": p99}


class _TimedSink:
    """Notes when outputs come, in the engine's thread."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.batches: queue.SimpleQueue[tuple[float, Sequence[RequestOutput]]] = queue.SimpleQueue()

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        self.batches.put((self._clock(), outputs))


def run_load(
    engine: Engine,
    requests: Sequence[GenerationRequest],
    *,
    concurrency: int,
    on_finished: Callable[[], None] = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> LoadRun:
    """Keeps `concurrency` requests in the engine until all are done.

    Ids must be distinct. Raises what `Engine.add` does.
    """
    sink = _TimedSink(clock)
    waiting = deque(requests)
    times: dict[str, RequestTimes] = {}
    before = engine.snapshot()
    engine.metrics.keep_recent_steps(_NUM_STEPS_KEPT)
    started_s = clock()
    num_running = 0
    while waiting or num_running:
        while waiting and num_running < concurrency:
            request = waiting.popleft()
            times[request.request_id] = RequestTimes(
                clock(), num_prompt_tokens=len(request.prompt_token_ids)
            )
            engine.add(request, sink)
            num_running += 1
        now_s, outputs = sink.batches.get()
        for output in outputs:
            entry = times[output.request_id]
            entry.token_times_s.extend([now_s] * len(output.token_ids))
            if output.finish_reason is not None:
                entry.finish_reason = output.finish_reason
                num_running -= 1
                on_finished()
    elapsed_s = clock() - started_s
    after = engine.snapshot()
    return LoadRun(
        requests=list(times.values()),
        steps=list(engine.metrics.recent_steps),
        elapsed_s=elapsed_s,
        num_compiles=after.compiles_after_ready,
        num_preemptions=after.num_preemptions - before.num_preemptions,
    )
