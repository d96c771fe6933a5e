"""The open loop: every request leaves when it is due, whatever came back so far."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np

from jaxserve.client import MAX_MESSAGE_BYTES
from jaxserve.loadgen.records import LoadRecord, RequestRecord, generator_health
from jaxserve.loadgen.schedule import PlannedRequest
from jaxserve.proto.v1 import inference_pb2, inference_pb2_grpc
from jaxserve.server import convert

START_DELAY_S = 0.2
"""Between building the requests and the start of the schedule."""

_Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class _Outgoing:
    record: RequestRecord
    message: inference_pb2.GenerateRequest


def run_open_loop(
    address: str,
    schedule: Sequence[PlannedRequest],
    *,
    vocab_size: int,
    seed: int = 0,
    api_key: str | None = None,
    on_finished: Callable[[], None] = lambda: None,
) -> LoadRecord:
    """Sends the schedule to a server and reads every answer to its end.

    Prompts are random token ids; answers are greedy and run to their full
    length. A request that fails is recorded with its gRPC status.

    Args:
        api_key: for a server that asks for one.
    """
    metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
    outgoing = _outgoing(schedule, vocab_size, seed)
    return asyncio.run(_run(address, outgoing, metadata, on_finished))


def _outgoing(schedule: Sequence[PlannedRequest], vocab_size: int, seed: int) -> list[_Outgoing]:
    """Built before the clock starts, so that sending is all there is to do."""
    rng = np.random.default_rng((seed, 2))
    return [
        _Outgoing(
            RequestRecord(planned),
            convert.generate_request(
                rng.integers(0, vocab_size, planned.num_prompt_tokens).tolist(),
                temperature=0.0,
                max_tokens=planned.num_output_tokens,
                ignore_eos=True,
            ),
        )
        for planned in schedule
    ]


async def _run(
    address: str,
    outgoing: list[_Outgoing],
    metadata: _Metadata,
    on_finished: Callable[[], None],
) -> LoadRecord:
    options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:
        stub: Any = inference_pb2_grpc.InferenceStub(channel)
        await asyncio.wait_for(channel.channel_ready(), timeout=30)
        loop = asyncio.get_running_loop()
        start_s = loop.time() + START_DELAY_S
        cpu_before_s = time.process_time()
        tasks = []
        for one in outgoing:
            delay_s = start_s + one.record.planned.due_s - loop.time()
            if delay_s > 0:
                await asyncio.sleep(delay_s)
            tasks.append(asyncio.create_task(_send(stub, one, metadata, start_s, on_finished)))
        await asyncio.gather(*tasks)
        elapsed_s = loop.time() - start_s
    records = [one.record for one in outgoing]
    health = generator_health(records, time.process_time() - cpu_before_s, elapsed_s)
    return LoadRecord(records, elapsed_s, health)


async def _send(
    stub: Any,
    one: _Outgoing,
    metadata: _Metadata,
    start_s: float,
    on_finished: Callable[[], None],
) -> None:
    record, clock = one.record, asyncio.get_running_loop().time
    record.sent_s = clock() - start_s
    try:
        async for message in stub.Generate(one.message, metadata=metadata):
            num_tokens = len(message.output.token_ids)
            if num_tokens:
                record.message_s.append(clock() - start_s)
                record.num_tokens += num_tokens
            if message.HasField("usage"):
                record.queue_s = message.usage.queue_s
        record.status = "OK" if record.queue_s is not None else "NO_USAGE"
    except grpc.aio.AioRpcError as error:
        record.status = error.code().name
    on_finished()
