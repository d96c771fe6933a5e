"""Clients over gRPC and HTTP: one request at a time, each said how it ended."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any, Protocol

import grpc

from jaxserve.proto.v1 import inference_pb2_grpc
from jaxserve.server import convert
from jaxserve.server.metadata import REQUEST_ID_KEY, RETRY_KEY
from jaxserve.server.pacing import Pacing
from tools.chaos.questions import FLUSH_TOKENS, NUM_OUTPUT_TOKENS, Answer, End

ANSWER_TIMEOUT_S = 300
"""Longer than any queue, with a pause of the machine in it."""
_REFUSALS = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)


class Client(Protocol):
    """Of one protocol."""

    async def ask(
        self, answer: Answer, prompt: Sequence[int], leave_after: int | None = None
    ) -> None:
        """Fills `answer`. With `leave_after` it leaves once it has so many tokens."""
        ...

    async def close(self) -> None: ...


class GrpcClient:
    """All its requests share a connection."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.initial_reconnect_backoff_ms", 200),
                ("grpc.max_reconnect_backoff_ms", 500),
                ("grpc.use_local_subchannel_pool", 1),
            ],
        )
        self._stub: Any = inference_pb2_grpc.InferenceStub(self._channel)

    async def ask(
        self, answer: Answer, prompt: Sequence[int], leave_after: int | None = None
    ) -> None:
        message = convert.generate_request(
            prompt,
            temperature=0.0,
            max_tokens=NUM_OUTPUT_TOKENS,
            ignore_eos=True,
            pacing=Pacing(flush_tokens=FLUSH_TOKENS),
        )
        call = self._stub.Generate(message, timeout=ANSWER_TIMEOUT_S)
        is_whole = False
        try:
            head = dict(await call.initial_metadata() or ())
            answer.is_begun = REQUEST_ID_KEY in head
            async for response in call:
                if response.output.token_ids:
                    answer.token_ids.extend(response.output.token_ids)
                    answer.message_s.append(time.monotonic())
                is_whole = is_whole or response.HasField("usage")
                if leave_after is not None and len(answer.token_ids) >= leave_after:
                    call.cancel()
                    answer.end = End.LEFT
                    break
            else:
                answer.end = End.WHOLE if is_whole else End.BROKEN
        except grpc.aio.AioRpcError as error:
            answer.end = _end_of(error, answer)
            answer.detail = f"{error.code().name}: {(error.details() or '')[:60]}"
            retry = dict(error.trailing_metadata() or ()).get(RETRY_KEY)
            answer.retry_after_s = 0.0 if retry is None else int(retry) / 1000
        answer.ended_s = time.monotonic()

    async def close(self) -> None:
        await self._channel.close()


def _end_of(error: grpc.aio.AioRpcError, answer: Answer) -> End:
    if error.code() not in _REFUSALS:
        return End.FAILED
    details = error.details() or ""
    # The library's own words for a connection that is not there.
    if "onnect" in details or "GOAWAY" in details or "ocket closed" in details:
        return End.BROKEN if answer.is_begun else End.UNREACHABLE
    return End.CUT if answer.token_ids else End.REFUSED


class HttpClient:
    """A connection a request, closed after it."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def ask(
        self, answer: Answer, prompt: Sequence[int], leave_after: int | None = None
    ) -> None:
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                await self._ask(answer, prompt, leave_after)
        except (OSError, asyncio.IncompleteReadError) as error:
            answer.end = End.BROKEN if answer.is_begun else End.UNREACHABLE
            answer.detail = type(error).__name__
        answer.ended_s = time.monotonic()

    async def _ask(self, answer: Answer, prompt: Sequence[int], leave_after: int | None) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            writer.write(http_request("/v1/completions", completion(prompt)))
            await writer.drain()
            status, headers = await _head(reader)
            if status != 200:
                answer.detail = str(status)
                answer.end = End.REFUSED if status in (429, 503) else End.FAILED
                answer.retry_after_s = float(headers.get("retry-after", 0))
                return
            answer.is_begun = True
            answer.end = await _read_events(reader, answer, leave_after)
        finally:
            writer.close()

    async def close(self) -> None:
        """There is nothing that stays open."""


def completion(prompt: Sequence[int], **changes: Any) -> dict[str, Any]:
    """The body of a stream."""
    return {
        "prompt": list(prompt),
        "max_tokens": NUM_OUTPUT_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"flush_tokens": FLUSH_TOKENS},
    } | changes


def http_request(path: str, body: Any) -> bytes:
    """A whole request, after which the server closes the connection."""
    data = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    return int(lines[0].split()[1]), headers


async def _read_events(
    reader: asyncio.StreamReader, answer: Answer, leave_after: int | None
) -> End:
    while line := await reader.readline():
        if not line.startswith(b"data: "):
            continue
        if line.startswith(b"data: [DONE]"):
            return End.WHOLE
        event = json.loads(line[6:])
        if "error" in event:
            answer.detail = event["error"]["code"]
            return End.CUT if event["error"]["code"] != "internal_error" else End.FAILED
        token_ids = event["choices"][0].get("token_ids") or []
        if token_ids:
            answer.token_ids.extend(token_ids)
            answer.message_s.append(time.monotonic())
        if leave_after is not None and len(answer.token_ids) >= leave_after:
            return End.LEFT
    return End.BROKEN
