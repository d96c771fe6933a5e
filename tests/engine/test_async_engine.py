from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import pytest

from jaxserve.engine.async_engine import AsyncEngine
from jaxserve.engine.request import FinishReason, RequestOutput
from jaxserve.errors import InvalidRequest, NotAccepting, QueueFull, StreamTooSlow
from tests.engine.engine_rig import make_engine, request


@asynccontextmanager
async def running(*, max_backlog_tokens: int = 4096, **settings: Any) -> AsyncIterator[AsyncEngine]:
    engine, _ = make_engine(**settings)
    engine.start()
    try:
        yield AsyncEngine(engine, asyncio.get_running_loop(), max_backlog_tokens=max_backlog_tokens)
    finally:
        await asyncio.to_thread(engine.stop)
        engine._scheduler.check_integrity()


async def read(streams: AsyncEngine, name: str, **sampling: Any) -> list[RequestOutput]:
    return [output async for output in streams.generate(request(name, **sampling))]


async def until_no_streams(streams: AsyncEngine) -> None:
    async with asyncio.timeout(10.0):
        while streams.num_streams:
            await asyncio.sleep(0.002)


def test_streams_are_whole_and_the_loop_wakes_once_a_step() -> None:
    async def main() -> None:
        async with running() as streams:
            wakes = 0
            dispatch = streams.dispatch

            def counting(outputs):  # type: ignore[no-untyped-def]
                nonlocal wakes
                wakes += 1
                dispatch(outputs)

            streams.dispatch = counting  # type: ignore[method-assign]
            results = await asyncio.gather(
                *(read(streams, f"r{index}", seed=index, max_tokens=20) for index in range(8))
            )
            for outputs in results:
                assert [o.finish_reason for o in outputs[:-1]] == [None] * (len(outputs) - 1)
                assert outputs[-1].finish_reason is FinishReason.LENGTH
                assert sum(len(o.token_ids) for o in outputs) == 20
            assert wakes <= streams.engine.metrics.num_steps
            assert streams.num_streams == 0

    asyncio.run(main())


def test_leaving_early_aborts_and_frees_the_pages() -> None:
    async def main() -> None:
        async with running(step_s=0.002) as streams:
            async with aclosing(streams.generate(request("a", max_tokens=60))) as outputs:
                async for _ in outputs:
                    break
            await until_no_streams(streams)
            assert streams.engine.snapshot().num_running == 0
            assert streams.engine.metrics.num_finished[FinishReason.CANCELLED] == 1
            # The id is free again, and the new stream is not the old one's.
            outputs_again = await read(streams, "a", max_tokens=3)
            assert outputs_again[-1].finish_reason is FinishReason.LENGTH

    asyncio.run(main())


def test_leaving_a_stream_that_has_ended_unread_spares_the_next_one_of_that_id() -> None:
    async def main() -> None:
        async with running(step_s=0.002) as streams:
            old = streams.generate(request("a", max_tokens=4))
            await anext(old)
            await until_no_streams(streams)  # Ended, but its last outputs are unread.
            new = streams.generate(request("a", max_tokens=60))
            await anext(new)
            await old.aclose()
            rest = [output async for output in new]
            assert rest[-1].finish_reason is FinishReason.LENGTH
            assert streams.engine.metrics.num_finished[FinishReason.CANCELLED] == 0

    asyncio.run(main())


def test_cancelling_the_reading_task_aborts() -> None:
    async def main() -> None:
        async with running(step_s=0.002) as streams:
            task = asyncio.create_task(read(streams, "a", max_tokens=60))
            await asyncio.sleep(0.02)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until_no_streams(streams)
            assert streams.engine.metrics.num_finished[FinishReason.CANCELLED] == 1

    asyncio.run(main())


def test_an_id_in_use_or_not_yet_wound_up_is_refused() -> None:
    async def main() -> None:
        async with running(step_s=0.01) as streams:
            first = streams.generate(request("a", max_tokens=60))
            await anext(first)
            with pytest.raises(InvalidRequest, match="request_id"):
                await anext(streams.generate(request("a")))
            await first.aclose()
            with pytest.raises(InvalidRequest, match="request_id"):
                await anext(streams.generate(request("a")))
            await until_no_streams(streams)
            assert len(await read(streams, "a", max_tokens=2)) == 2

    asyncio.run(main())


def test_refusals_come_from_the_first_anext() -> None:
    async def main() -> None:
        async with running(step_s=0.01, max_num_seqs=1, max_queued_requests=1) as streams:
            with pytest.raises(InvalidRequest, match="top_p"):
                await read(streams, "bad", top_p=2.0)
            running_one = streams.generate(request("a", max_tokens=60))
            await anext(running_one)
            waiting = asyncio.create_task(read(streams, "b", max_tokens=2))
            await asyncio.sleep(0.01)
            with pytest.raises(QueueFull):
                await read(streams, "c")
            await running_one.aclose()
            assert len(await waiting) == 2
            await asyncio.to_thread(streams.engine.drain, 5.0)
            with pytest.raises(NotAccepting):
                await read(streams, "d")
            assert streams.num_streams == 0

    asyncio.run(main())


def test_a_reader_that_falls_behind_is_cancelled_with_the_reason() -> None:
    async def main() -> None:
        async with running(max_backlog_tokens=10, step_s=0.002) as streams:
            slow = streams.generate(request("a", max_tokens=60))
            await anext(slow)
            await asyncio.sleep(0.3)
            with pytest.raises(StreamTooSlow, match="10 tokens"):
                async for _ in slow:
                    pass
            await until_no_streams(streams)
            assert streams.engine.snapshot().num_running == 0
            fast = await read(streams, "b", max_tokens=20)
            assert fast[-1].finish_reason is FinishReason.LENGTH

    asyncio.run(main())


def test_a_reader_that_pauses_within_the_bound_loses_nothing() -> None:
    async def main() -> None:
        async with running(max_backlog_tokens=60) as streams:
            outputs = []
            async for output in streams.generate(request("a", max_tokens=50)):
                outputs.append(output)
                if len(outputs) == 1:
                    await asyncio.sleep(0.2)
            assert sum(len(o.token_ids) for o in outputs) == 50
            assert outputs[-1].finish_reason is FinishReason.LENGTH

    asyncio.run(main())


def test_many_cycles_of_connect_and_cancel_leave_nothing_behind() -> None:
    async def main() -> None:
        async with running() as streams:

            async def cycle(index: int) -> None:
                stream = streams.generate(request(f"r{index}", max_tokens=40))
                for _ in range(index % 4):
                    await anext(stream)
                await stream.aclose()

            for start in range(0, 400, 8):
                await asyncio.gather(*(cycle(start + offset) for offset in range(8)))
            await until_no_streams(streams)
            # A step in flight at the last cancel holds pages until it is committed.
            async with asyncio.timeout(10.0):
                snapshot = streams.engine.snapshot()
                while snapshot.num_pages_free + snapshot.num_pages_cached != 64:
                    await asyncio.sleep(0.002)
                    snapshot = streams.engine.snapshot()
            assert (snapshot.num_running, snapshot.num_waiting) == (0, 0)

    asyncio.run(main())
