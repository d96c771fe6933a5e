"""An encoder's scheduler and engine around a device that a test controls."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.encoder.engine import EncoderEngine
from jaxserve.engine.encoder.executor import pack_texts
from jaxserve.engine.encoder.plan import EncodeBucket, EncodePlan, EncodeResults
from jaxserve.engine.encoder.scheduler import EncoderScheduler
from jaxserve.engine.encoder.settings import resolve_encoder_settings
from jaxserve.engine.request import FinishReason, GenerationRequest, Request
from jaxserve.errors import ConfigError, NotAccepting, QueueFull
from models.encoder_loading import open_encoder

BUCKETS = tuple(
    EncodeBucket(*shape) for shape in ((1, 4), (8, 4), (1, 8), (4, 8), (1, 16), (2, 16))
)
ENCODER = Path(__file__).parent.parent / "goldens" / "tiny_bert"


def record(name: str, num_tokens: int) -> Request:
    generation = GenerationRequest(name, tuple(range(num_tokens)))
    return Request(generation, max_tokens=0, seed=0, stop_token_ids=frozenset(), arrival_s=0.0)


def results_of(plan: EncodePlan) -> EncodeResults:
    """A vector that tells which ids it was made of."""
    rows = [[len(text.token_ids), sum(text.token_ids)] for text in plan.texts]
    return EncodeResults(plan.step_id, np.array(rows, np.float32))


class GatedExecutor:
    """Makes vectors of the ids; a step ends when the gate is open."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.fails = False
        self.plans: list[EncodePlan] = []
        self._in_flight: deque[EncodePlan] = deque()

    def can_accept(self) -> bool:
        return not self._in_flight

    def submit(self, plan: EncodePlan) -> None:
        pack_texts([text.token_ids for text in plan.texts], plan.bucket)  # It fits.
        self.plans.append(plan)
        self._in_flight.append(plan)

    def next_completion(self) -> tuple[EncodePlan, EncodeResults]:
        self.gate.wait()
        if self.fails:
            raise RuntimeError("the device broke")
        plan = self._in_flight.popleft()
        results = results_of(plan)
        for index, text in enumerate(plan.texts):
            if text.request_id.startswith("nan"):
                results.vectors[index] = np.nan
        return plan, results


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 16), min_size=1, max_size=40),
    st.integers(1, 3),
    st.sets(st.integers(0, 39)),
)
def test_every_text_is_computed_once_the_oldest_first(
    lengths: list[int], max_in_flight: int, ended: set[int]
) -> None:
    scheduler = EncoderScheduler(BUCKETS, max_in_flight=max_in_flight)
    requests = [record(str(index), length) for index, length in enumerate(lengths)]
    for request in requests:
        scheduler.add(request)
    for index in ended & set(range(0, len(requests), 2)):
        assert scheduler.finish(str(index), FinishReason.CANCELLED) is requests[index]
    waiting = [request for request in requests if request.finish_reason is None]
    done: list[str] = []
    in_flight: deque[EncodePlan] = deque()
    while scheduler.has_work:
        plan = scheduler.plan(1.0)
        if plan is not None:
            names = [text.request_id for text in plan.texts]
            assert names[0] == waiting[0].request_id
            waiting = [request for request in waiting if request.request_id not in names]
            assert plan.bucket in BUCKETS
            pack_texts([text.token_ids for text in plan.texts], plan.bucket)
            longest = max(len(text.token_ids) for text in plan.texts)
            assert plan.bucket.num_positions < 2 * max(longest, 3)
            in_flight.append(plan)
            for name in set(names) & {str(index) for index in ended}:
                assert scheduler.finish(name, FinishReason.CANCELLED) is not None
                assert scheduler.finish(name, FinishReason.CANCELLED) is None
        if plan is None or len(in_flight) == max_in_flight:
            assert in_flight
            oldest = in_flight.popleft()
            for update in scheduler.commit(oldest, results_of(oldest), 2.0):
                assert update.vector is not None
                assert update.vector[0] == update.request.num_prompt_tokens
                done.append(update.request.request_id)
        scheduler.check_integrity()
    expected = [str(index) for index in range(len(lengths)) if index not in ended]
    assert sorted(done) == sorted(expected)
    assert (scheduler.num_running, scheduler.num_waiting, scheduler.num_waiting_tokens) == (0, 0, 0)


def test_free_places_go_to_shorter_texts() -> None:
    scheduler = EncoderScheduler(BUCKETS, max_in_flight=2)
    for name, length in (("a", 6), ("b", 2), ("c", 3), ("d", 7), ("e", 1), ("f", 4)):
        scheduler.add(record(name, length))
    first, second = scheduler.plan(0.0), scheduler.plan(0.0)
    assert first is not None
    assert second is not None
    assert [text.request_id for text in first.texts] == ["a", "d", "b", "c"]
    assert [text.request_id for text in second.texts] == ["e", "f"]
    assert (first.bucket, second.bucket) == (EncodeBucket(4, 8), EncodeBucket(8, 4))
    assert first.num_tokens == 18


@asynccontextmanager
async def running(executor: GatedExecutor, max_queued: int = 64) -> AsyncIterator[AsyncEngine]:
    engine = EncoderEngine(
        EncoderScheduler(BUCKETS, max_in_flight=1),
        executor,
        max_tokens=16,
        vocab_size=100,
        max_queued_requests=max_queued,
        max_queued_tokens=1 << 20,
    )
    engine.start()
    try:
        yield AsyncEngine(engine, asyncio.get_running_loop())
    finally:
        executor.gate.set()
        assert await asyncio.to_thread(engine.stop)


def requests(*lengths: int, name: str = "r", deadline_s: float | None = None):
    return [
        GenerationRequest(f"{name}{index}", tuple(range(length)), deadline_s=deadline_s)
        for index, length in enumerate(lengths)
    ]


def test_a_cancelled_caller_frees_the_queue() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        executor.gate.clear()
        async with running(executor) as streams:
            task = asyncio.create_task(streams.complete_all(requests(*[16] * 20)))
            while not executor.plans:
                await asyncio.sleep(0.001)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            executor.gate.set()
            async with asyncio.timeout(10):
                while streams.num_streams:
                    await asyncio.sleep(0.001)
            assert len(executor.plans) <= 2
            outputs = await streams.complete_all(requests(3, 9))
            assert [output.embedding.tolist() for output in outputs] == [[3, 3], [9, 36]]
            streams.engine._scheduler.check_integrity()

    asyncio.run(main())


def test_a_deadline_ends_texts_that_wait() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        executor.gate.clear()
        async with running(executor) as streams:
            first = asyncio.create_task(streams.complete_all(requests(5, name="a")))
            while not executor.plans:
                await asyncio.sleep(0.001)
            late = requests(5, 5, name="b", deadline_s=time.monotonic() + 0.01)
            second = asyncio.create_task(streams.complete_all(late))
            await asyncio.sleep(0.02)
            executor.gate.set()
            assert [o.finish_reason for o in await second] == [FinishReason.DEADLINE] * 2
            assert (await first)[0].embedding is not None

    asyncio.run(main())


def test_a_full_queue_takes_none_of_the_texts() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        executor.gate.clear()
        async with running(executor, max_queued=4) as streams:
            first = asyncio.create_task(streams.complete_all(requests(5, name="a")))
            while not executor.plans:
                await asyncio.sleep(0.001)
            with pytest.raises(QueueFull):
                await streams.complete_all(requests(*[5] * 6, name="b"))
            executor.gate.set()
            assert len(await first) == 1
            async with asyncio.timeout(10):
                while streams.num_streams:
                    await asyncio.sleep(0.001)
            counts = streams.engine.metrics.num_finished
            assert (counts[FinishReason.STOP], counts[FinishReason.CANCELLED]) == (1, 4)

    asyncio.run(main())


def test_numbers_that_are_not_finite_are_an_error_of_that_text_alone() -> None:
    async def main() -> None:
        async with running(GatedExecutor()) as streams:
            asked = requests(4, 4) + requests(4, name="nan")
            outputs = await streams.complete_all(asked)
            reasons = [output.finish_reason for output in outputs]
            assert reasons == [FinishReason.STOP, FinishReason.STOP, FinishReason.ERROR]
            assert outputs[2].embedding is None

    asyncio.run(main())


def test_a_device_that_fails_ends_all_and_is_told() -> None:
    async def main() -> None:
        executor = GatedExecutor()
        executor.fails = True
        async with running(executor) as streams:
            outputs = await streams.complete_all(requests(4, 4))
            assert {output.finish_reason for output in outputs} == {FinishReason.ERROR}
            assert streams.engine.snapshot().failed
            with pytest.raises(NotAccepting):
                await streams.complete_all(requests(4))

    asyncio.run(main())


def test_settings_follow_the_model_and_refuse_what_has_no_use() -> None:
    encoder, device = open_encoder(ENCODER), jax.devices("cpu")[0]
    config = EngineConfig(str(ENCODER))
    resolved = resolve_encoder_settings(config, encoder, device)
    assert resolved.buckets == (EncodeBucket(1, 20), EncodeBucket(25, 20))
    longer = replace(encoder, max_tokens=200, config=encoder.config)
    shapes = resolve_encoder_settings(config, longer, device).buckets
    assert {bucket.num_positions for bucket in shapes} == {32, 64, 128, 200}
    assert max(bucket.num_rows for bucket in shapes) <= 512
    one = resolve_encoder_settings(replace(config, buckets="one"), longer, device)
    assert one.buckets == (EncodeBucket(2, 200),)
    for changes, message in (
        ({"policy": "orca", "prefix_caching": False}, "no use for --policy, --prefix-caching"),
        ({"buckets": (4, 8)}, "--buckets takes no row counts for an encoder"),
        ({"max_model_len": 21}, "--max-model-len 21 is beyond the 20 tokens"),
        ({"token_budget": 19}, "--token-budget 19 does not hold one text of 20"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve_encoder_settings(replace(config, **changes), encoder, device)
