"""An open-loop load on an engine in this process, step by step recorded."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.request import ServiceObjective
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.run import SimRequest
from jaxserve.simulator.workloads import Lengths, sample_lengths
from tools.policy_evaluation.streams import TIMEOUT_S, TokenLog, make_request

PUBLISHED_CONTEXT = 8192


def chat_requests(
    context: int,
    num_requests: int,
    qps: float,
    seed: int,
    objectives: Sequence[ServiceObjective] = (),
) -> list[SimRequest]:
    """ShareGPT lengths scaled to the context, Poisson arrivals; objectives in turn."""
    published = sample_lengths("sharegpt", num_requests, seed, max_model_len=PUBLISHED_CONTEXT)
    factor = context / PUBLISHED_CONTEXT
    times_s = ArrivalProcess().unit_times_s(num_requests, seed) / qps
    return [
        SimRequest(
            Lengths(max(1, int(prompt * factor)), max(1, int(output * factor))),
            float(time_s),
            objectives[index % len(objectives)] if objectives else None,
        )
        for index, ((prompt, output), time_s) in enumerate(zip(published, times_s, strict=True))
    ]


def saturated_qps(context: int, token_budget: int, step_s: float) -> float:
    """Chat requests per second that full steps compute, each taking `step_s`."""
    requests = chat_requests(context, 1000, 1.0, seed=1)
    return token_budget / step_s / float(np.mean([sum(one.lengths) for one in requests]))


@dataclass(frozen=True, slots=True)
class LiveRun:
    """Seconds; one array of token times a request, from its due time."""

    token_s: list[np.ndarray]
    queue_s: np.ndarray
    lateness_s: np.ndarray
    """How late each request was added."""
    elapsed_s: float

    @property
    def ttft_s(self) -> np.ndarray:
        return np.array([times[0] for times in self.token_s])

    @property
    def tbt_s(self) -> np.ndarray:
        return np.concatenate([np.diff(times) for times in self.token_s])


def run_live(engine: Engine, requests: Sequence[SimRequest]) -> LiveRun:
    """Adds each request when it is due and waits for all. Raises TimeoutError."""
    log = TokenLog()
    made = [
        make_request(f"r{index}", *request.lengths, seed=index, objective=request.objective)
        for index, request in enumerate(requests)
    ]
    start_s = time.monotonic() + 0.1
    lateness_s = []
    for request, generation in zip(requests, made, strict=True):
        due_s = start_s + request.arrival_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        lateness_s.append(time.monotonic() - due_s)
        engine.add(generation, log)
    names = [generation.request_id for generation in made]
    log.wait_finished(names, TIMEOUT_S)
    token_s = [
        np.array(log.token_s[name]) - start_s - request.arrival_s
        for name, request in zip(names, requests, strict=True)
    ]
    return LiveRun(
        token_s,
        np.array([log.queue_s[name] for name in names]),
        np.array(lateness_s),
        time.monotonic() - start_s,
    )
