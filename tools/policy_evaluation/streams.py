"""Steady decodes, and long prompts that arrive beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxserve.engine.engine import Engine
from jaxserve.engine.request import GenerationRequest, RequestOutput, ServiceObjective
from jaxserve.engine.sampling_params import SamplingParams
from tools.policy_evaluation.operating_point import VOCAB_SIZE

STEADY_PROMPT = 16
TIMEOUT_S = 120.0


class TokenLog:
    """An output sink that notes when each request's tokens came."""

    def __init__(self) -> None:
        self.token_s: dict[str, list[float]] = {}
        self.queue_s: dict[str, float] = {}
        """Of requests that ended."""
        self._changed = threading.Condition()

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        now_s = time.monotonic()
        with self._changed:
            for output in outputs:
                if output.token_ids:
                    self.token_s.setdefault(output.request_id, []).append(now_s)
                if output.usage is not None:
                    self.queue_s[output.request_id] = output.usage.queue_s
            self._changed.notify_all()

    def wait_for_tokens(self, request_ids: Sequence[str], num_tokens: int) -> None:
        """Until each of them has so many."""
        self._wait(lambda: all(len(self.token_s.get(i, ())) >= num_tokens for i in request_ids))

    def wait_finished(self, request_ids: Sequence[str], timeout_s: float = TIMEOUT_S) -> None:
        self._wait(lambda: all(i in self.queue_s for i in request_ids), timeout_s)

    def gaps_s(self, request_ids: Sequence[str], start_s: float, end_s: float) -> np.ndarray:
        """Between neighbouring tokens of a request, both in [start, end]."""
        gaps = []
        for request_id in request_ids:
            times = np.array(self.token_s[request_id])
            gaps.append(np.diff(times[(times >= start_s) & (times <= end_s)]))
        return np.concatenate(gaps)

    def _wait(self, ready: object, timeout_s: float = TIMEOUT_S) -> None:
        assert callable(ready)
        with self._changed:
            if not self._changed.wait_for(ready, timeout_s):
                raise TimeoutError(f"the engine did not finish in {timeout_s:g} s")


def make_request(
    name: str,
    num_prompt: int,
    num_output: int,
    *,
    seed: int = 0,
    objective: ServiceObjective | None = None,
) -> GenerationRequest:
    """Random prompt, greedy answer of exactly that length."""
    rng = np.random.default_rng((seed, num_prompt))
    ids = tuple(rng.integers(1, VOCAB_SIZE, num_prompt).tolist())
    sampling = SamplingParams(temperature=0.0, max_tokens=num_output, ignore_eos=True)
    return GenerationRequest(name, ids, sampling, objective=objective)


@dataclass(frozen=True, slots=True)
class StreamsRun:
    gaps_s: np.ndarray
    """Of the steady streams, from the first arrival to the last one's end."""
    ttft_s: np.ndarray
    """Of the long prompts."""
    quiet_s: tuple[float, float]
    """Start and end of the run proper; before and after it only decodes ran."""


def start_steady(
    engine: Engine, log: TokenLog, num_streams: int, prompt_len: int = STEADY_PROMPT
) -> list[str]:
    """Streams that go on for longer than any run; returns when all decode."""
    names = [f"steady-{index}" for index in range(num_streams)]
    for index, name in enumerate(names):
        engine.add(
            make_request(name, prompt_len, engine.max_model_len - prompt_len, seed=index), log
        )
    log.wait_for_tokens(names, 3)
    return names


def run_long_prompts(
    engine: Engine,
    *,
    num_steady: int,
    prompt_len: int,
    period_s: float,
    num_prompts: int,
    steady_prompt: int = STEADY_PROMPT,
    alone_tokens: int = 3,
) -> StreamsRun:
    """Long prompts at fixed times, whatever the engine does with them.

    Args:
        alone_tokens: each steady stream gets so many before the first prompt,
            and again after the last one.
    """
    log = TokenLog()
    steady = start_steady(engine, log, num_steady, steady_prompt)
    log.wait_for_tokens(steady, alone_tokens)
    start_s = time.monotonic()
    added_s = {}
    for index in range(num_prompts):
        time.sleep(max(0.0, start_s + index * period_s - time.monotonic()))
        name = f"long-{index}"
        added_s[name] = time.monotonic()
        engine.add(make_request(name, prompt_len, 4, seed=1000 + index), log)
    log.wait_finished(list(added_s))
    end_s = time.monotonic()
    num_now = max(len(log.token_s[name]) for name in steady)
    log.wait_for_tokens(steady, num_now + alone_tokens)
    unfinished = [name for name in steady if name not in log.queue_s]
    if len(unfinished) < num_steady:
        raise RuntimeError("steady streams reached the end of the context: send fewer prompts")
    for name in steady:
        engine.abort(name)
    log.wait_finished(steady)
    ttft_s = np.array([log.token_s[name][0] - added_s[name] for name in added_s])
    return StreamsRun(log.gaps_s(steady, start_s, end_s), ttft_s, (start_s, end_s))
