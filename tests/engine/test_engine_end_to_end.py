"""The engine on a tiny random Llama and the real device executor."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.offline import Completion, complete_in_order
from jaxserve.engine.request import FinishReason, GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import RunningEngine, start_engine
from tests.engine.tiny_model import make_tiny_model

PAGE_BYTES = 1024
"""L 2, page of 4 tokens, K and V, K 2, D 8, float32."""


@pytest.fixture(scope="module")
def running(
    tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path
) -> Iterator[RunningEngine]:
    """One bucket, so that a request's bits don't depend on what runs beside
    it, and a pool that is too small for six requests of the longest kind."""
    engine = start_engine(
        EngineConfig(
            model=str(make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")),
            dtype="float32",
            token_budget=8,
            buckets="one",
            max_num_seqs=6,
            page_size=4,
            kv_cache_bytes=20 * PAGE_BYTES,
            compilation_cache_dir=compilation_cache,
        )
    )
    yield engine
    engine.close()


def requests(count: int, prefix: str) -> list[GenerationRequest]:
    """Prompts and settings of many kinds; the same for the same index."""
    made = []
    for index in range(count):
        rng = random.Random(index)
        prompt = tuple(rng.randrange(256) for _ in range(rng.choice((1, 5, 13, 30))))
        sampling = SamplingParams(
            temperature=rng.choice((0.0, 0.8)),
            top_p=rng.choice((1.0, 0.9)),
            top_k=rng.choice((0, 20)),
            seed=index,
            repetition_penalty=rng.choice((1.0, 1.2)),
            max_tokens=rng.randint(1, 30),
            logprobs=rng.choice((None, 2)),
            ignore_eos=True,
        )
        made.append(GenerationRequest(f"{prefix}{index}", prompt, sampling))
    return made


def run(running: RunningEngine, these: list[GenerationRequest], ahead: int) -> list[Completion]:
    return list(complete_in_order(running.engine, these, max_ahead=ahead))


def test_company_and_preemption_change_no_bit(running: RunningEngine) -> None:
    alone = run(running, requests(16, "alone"), 1)
    before = running.engine.snapshot().num_preemptions
    together = run(running, requests(16, "together"), 16)
    assert running.engine.snapshot().num_preemptions > before
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.text == other.text == running.tokenizer.decode(one.token_ids)
    assert running.engine.snapshot().compiles_after_ready == 0


def test_aborts_at_any_moment_leave_the_others_alone(running: RunningEngine) -> None:
    expected = {c.request_id: c for c in run(running, requests(12, "r"), 1)}

    async def main() -> None:
        streams = AsyncEngine(running.engine, asyncio.get_running_loop())

        async def whole(request: GenerationRequest) -> tuple[int, ...]:
            outputs = [output async for output in streams.generate(request)]
            assert outputs[-1].finish_reason is FinishReason.LENGTH
            return tuple(i for output in outputs for i in output.token_ids)

        async def cut_short(request: GenerationRequest, after: int) -> None:
            async with aclosing(streams.generate(request)) as outputs:
                count = 0
                async for _ in outputs:
                    count += 1
                    if count > after:
                        break

        cut = requests(24, "cut")
        results = await asyncio.gather(
            *(whole(request) for request in requests(12, "r")),
            *(cut_short(request, index % 5) for index, request in enumerate(cut)),
        )
        for request, token_ids in zip(requests(12, "r"), results, strict=False):
            assert token_ids == expected[request.request_id].token_ids
        async with asyncio.timeout(20.0):
            while streams.num_streams:
                await asyncio.sleep(0.01)

    asyncio.run(main())
    snapshot = running.engine.snapshot()
    assert (snapshot.num_running, snapshot.num_waiting) == (0, 0)
    assert snapshot.num_pages_free + snapshot.num_pages_cached == snapshot.num_pages_total
    assert snapshot.compiles_after_ready == 0
    running.engine._scheduler.check_integrity()
