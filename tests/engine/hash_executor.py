"""A deterministic executor without a device: tokens come from a function of
the request and the output's index, never from the step or the slot."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable

import numpy as np

from jaxserve.engine.plan import SlotLoad, StepPlan, StepResults
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS

TokenOf = Callable[[SlotLoad, int], int]


def hashed_token(vocab_size: int) -> TokenOf:
    """Tokens that look random and depend on prompt, seed and index."""

    def token_of(load: SlotLoad, index: int) -> int:
        key = repr((load.prompt_token_ids, load.seed, index)).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=4).digest(), "big") % vocab_size

    return token_of


def scripted_token(outputs: dict[str, bytes], then: int = ord(".")) -> TokenOf:
    """Request id -> the bytes it is to say, one token a byte."""

    def token_of(load: SlotLoad, index: int) -> int:
        script = outputs.get(load.request_id, b"")
        return script[index] if index < len(script) else then

    return token_of


class HashExecutor:
    """Keeps slots like a device does; checks what it is given as it goes."""

    def __init__(self, token_of: TokenOf, *, depth: int = 2, step_s: float = 0.0) -> None:
        self.depth = depth
        self.step_s = step_s
        self.plans: list[StepPlan] = []
        self.calls: list[str] = []
        self.fail_at_step: int | None = None
        self.failure = "the device is gone"
        self._token_of = token_of
        self._slots: dict[int, SlotLoad] = {}
        self._in_flight: deque[tuple[StepPlan, StepResults]] = deque()

    def can_accept(self) -> bool:
        return len(self._in_flight) < self.depth

    def submit(self, plan: StepPlan) -> None:
        assert self.can_accept()
        if self.fail_at_step is not None and len(self.plans) >= self.fail_at_step:
            raise RuntimeError(self.failure)
        self.plans.append(plan)
        self.calls.append(f"submit {plan.step_id}")
        for load in plan.slot_loads:
            self._slots[load.slot] = load
        token_ids = []
        for row in plan.sample_rows():
            load = self._slots[row.slot]
            index = row.position + 1 - len(load.prompt_token_ids)
            token_ids.append(row.target if row.target >= 0 else self._token_of(load, index))
        num = len(token_ids)
        results = StepResults(
            step_id=plan.step_id,
            token_ids=np.array(token_ids, np.int32),
            logprobs=-np.array(token_ids, np.float32),
            ranks=np.ones(num, np.int32),
            top_ids=np.tile(np.arange(MAX_TOP_LOGPROBS, dtype=np.int32), (num, 1)),
            top_logprobs=np.zeros((num, MAX_TOP_LOGPROBS), np.float32),
        )
        self._in_flight.append((plan, results))

    def next_completion(self) -> tuple[StepPlan, StepResults]:
        if not self._in_flight:
            raise LookupError("nothing is in flight")
        if self.step_s:
            time.sleep(self.step_s)
        plan, results = self._in_flight.popleft()
        self.calls.append(f"complete {plan.step_id}")
        return plan, results
