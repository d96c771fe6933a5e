"""One client for every engine: streams of `/v1/completions` over plain sockets.

It shares its cores with the engine that it measures, so it does as little as it can: it looks at
events without parsing them, but for those that end a stream.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field

from tools.peers.load import LoadRequest

START_DELAY_S = 0.05


class RequestFailed(RuntimeError):
    """An engine that did not do what it was asked."""


@dataclass(slots=True)
class Answer:
    """Times are seconds since the start of the load."""

    due_s: float
    num_prompt_tokens: int
    event_s: list[float] = field(default_factory=list)
    """When each event with a choice was read."""
    num_output_tokens: int = 0


@dataclass(frozen=True, slots=True)
class LoadResult:
    answers: Sequence[Answer]
    client_cpu_s: float


def run_load(port: int, load: Sequence[LoadRequest], fields: Mapping[str, object]) -> LoadResult:
    """Sends every request when it is due and reads all answers to their end.

    Raises RequestFailed if one is refused or has not as many tokens as asked for.
    """
    bodies = [json.dumps(completion_body(request, fields)).encode() for request in load]
    cpu_before_s = time.process_time()
    answers = asyncio.run(_run(port, load, bodies))
    return LoadResult(answers, time.process_time() - cpu_before_s)


def completion_body(request: LoadRequest, fields: Mapping[str, object]) -> dict[str, object]:
    """Greedy, to the full length."""
    return {
        "prompt": list(request.token_ids),
        "max_tokens": request.num_output_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


async def _run(port: int, load: Sequence[LoadRequest], bodies: Sequence[bytes]) -> list[Answer]:
    start_s = time.perf_counter() + START_DELAY_S
    return await asyncio.gather(
        *(_send(port, one, body, start_s) for one, body in zip(load, bodies, strict=True))
    )


async def _send(port: int, request: LoadRequest, body: bytes, start_s: float) -> Answer:
    answer = Answer(request.due_s, len(request.token_ids))
    await asyncio.sleep(max(0.0, start_s + request.due_s - time.perf_counter()))
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 22)
    try:
        writer.write(_head(port, len(body)) + body)
        async for part in read_body(reader):
            now_s = time.perf_counter() - start_s
            take_events(part, now_s, answer)
    finally:
        writer.close()
    if answer.num_output_tokens != request.num_output_tokens:
        raise RequestFailed(
            f"{answer.num_output_tokens} tokens came, not {request.num_output_tokens}"
        )
    return answer


def _head(port: int, num_bytes: int) -> bytes:
    return (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {num_bytes}\r\n\r\n"
    ).encode()


async def read_body(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of a reply's body as they come. Raises RequestFailed unless the status is 200."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = head.split(b" ", 2)[1]
    is_chunked = b"transfer-encoding: chunked" in head.lower()
    if status != b"200":
        rest = await reader.read(2000)
        raise RequestFailed(f"status {status.decode()}: {rest.decode(errors='replace')}")
    if not is_chunked:
        while part := await reader.read(1 << 16):
            yield part
        return
    while (size := int(await reader.readuntil(b"\r\n"), 16)) > 0:
        yield (await reader.readexactly(size + 2))[:-2]


def take_events(part: bytes, now_s: float, answer: Answer) -> None:
    """Note the time of a part with choices, and the usage when it comes.

    Servers send one chunk for each event or for some whole events, never half of one.
    """
    has_choice = False
    for line in part.split(b"\n"):
        if not line.startswith(b"data: {"):
            continue
        if b'"usage":{' in line or b'"usage": {' in line:
            event = json.loads(line[len(b"data: ") :])
            answer.num_output_tokens = event["usage"]["completion_tokens"]
            has_choice = has_choice or bool(event["choices"])
        elif line.startswith((b'data: {"error"', b'data: {"object":"error"')):
            raise RequestFailed(line.decode(errors="replace"))
        else:
            has_choice = True
    if has_choice:
        answer.event_s.append(now_s)
