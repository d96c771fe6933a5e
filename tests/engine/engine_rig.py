"""An engine of real parts around the deterministic executor."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jaxserve.engine.engine import Engine
from jaxserve.engine.request import FinishReason, GenerationRequest, RequestOutput
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.scheduler.config import SchedulerConfig
from jaxserve.engine.scheduler.scheduler import Scheduler
from models.config import ModelConfig
from tests.engine.hash_executor import HashExecutor, TokenOf, hashed_token
from tests.engine.tiny_tokenizers import EOS, byte_tokenizer

VOCAB_SIZE = 257
MODEL_CONFIG = ModelConfig(
    family="llama",
    vocab_size=VOCAB_SIZE,
    hidden_size=8,
    intermediate_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    eos_token_ids=(EOS,),
)


class CollectingSink:
    """Keeps every delivery and can wait for last outputs."""

    def __init__(self) -> None:
        self.deliveries: list[list[RequestOutput]] = []
        self._changed = threading.Condition()

    def deliver(self, outputs: Sequence[RequestOutput]) -> None:
        with self._changed:
            self.deliveries.append(list(outputs))
            self._changed.notify_all()

    def outputs(self, request_id: str) -> list[RequestOutput]:
        return [o for batch in self.deliveries for o in batch if o.request_id == request_id]

    def finals(self) -> dict[str, list[FinishReason]]:
        finals: dict[str, list[FinishReason]] = {}
        for output in (o for batch in self.deliveries for o in batch):
            if output.finish_reason is not None:
                finals.setdefault(output.request_id, []).append(output.finish_reason)
        return finals

    def wait_for(self, ready: Callable[[], bool], timeout_s: float = 20.0) -> None:
        with self._changed:
            assert self._changed.wait_for(ready, timeout_s), f"only {self.finals()}"

    def wait_finished(self, *request_ids: str) -> None:
        self.wait_for(lambda: set(request_ids) <= self.finals().keys())

    def text(self, request_id: str) -> str:
        return "".join(o.text for o in self.outputs(request_id))

    def token_ids(self, request_id: str) -> tuple[int, ...]:
        return tuple(i for o in self.outputs(request_id) for i in o.token_ids)


def make_scheduler(**changes: Any) -> Scheduler:
    settings: dict[str, Any] = {
        "num_pages": 64,
        "max_model_len": 64,
        "max_num_seqs": 8,
        "token_budget": 16,
        "buckets": (4, 16),
        "page_size": 4,
    }
    return Scheduler(SchedulerConfig(**(settings | changes)))


def make_engine(
    token_of: TokenOf | None = None,
    *,
    executor: HashExecutor | None = None,
    clock: Callable[[], float] = time.monotonic,
    step_s: float = 0.0,
    **scheduler: Any,
) -> tuple[Engine, HashExecutor]:
    executor = executor or HashExecutor(token_of or hashed_token(EOS), step_s=step_s)
    engine = Engine(
        make_scheduler(**scheduler), executor, byte_tokenizer(), MODEL_CONFIG, clock=clock
    )
    return engine, executor


def request(
    request_id: str, prompt: bytes = b"hi", *, deadline_s: float | None = None, **sampling: Any
) -> GenerationRequest:
    settings = {"temperature": 0.0, "seed": 1} | sampling
    return GenerationRequest(
        request_id, tuple(prompt), SamplingParams(**settings), deadline_s=deadline_s
    )
