"""Clients that nobody wants: they stop reading, send rubbish, or knock and go."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import struct
from collections.abc import Sequence

import grpc

from jaxserve.proto.v1 import inference_pb2_grpc
from jaxserve.server import convert
from tools.chaos.clients import completion, http_request
from tools.chaos.soaked_server import SoakedServer

MAX_TOKENS = 900
HTTP2_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"


async def read_nothing(
    server: SoakedServer, prompt: Sequence[int], seconds: float, *, over_grpc: bool
) -> None:
    """Asks for a long answer in large messages, and never reads it."""
    if over_grpc:
        await _read_nothing_of_grpc(server, prompt, seconds)
    else:
        await _read_nothing_of_http(server, prompt, seconds)


async def _read_nothing_of_grpc(
    server: SoakedServer, prompt: Sequence[int], seconds: float
) -> None:
    message = convert.generate_request(
        prompt, temperature=0.0, max_tokens=MAX_TOKENS, ignore_eos=True, logprobs=20
    )
    async with grpc.aio.insecure_channel(
        server.grpc_address, options=[("grpc.use_local_subchannel_pool", 1)]
    ) as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(message)
        await asyncio.sleep(seconds)
        call.cancel()


async def _read_nothing_of_http(
    server: SoakedServer, prompt: Sequence[int], seconds: float
) -> None:
    end = socket.socket()
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    end.setblocking(False)
    loop = asyncio.get_running_loop()
    try:
        with contextlib.suppress(OSError):
            await loop.sock_connect(end, ("127.0.0.1", server.http_port))
            body = completion(
                prompt, max_tokens=MAX_TOKENS, logprobs=20, stream_options={"flush_tokens": 1}
            )
            await loop.sock_sendall(end, http_request("/v1/completions", body))
        await asyncio.sleep(seconds)
    finally:
        end.close()


async def send_rubbish(server: SoakedServer, rng: random.Random) -> None:
    """One connection with something that is no request, to either port; waits for its end."""
    kind = rng.randrange(5)
    port = server.grpc_port if kind < 2 else server.http_port
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(5):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(_rubbish(kind, rng))
                with contextlib.suppress(OSError):
                    writer.write_eof()
                while await reader.read(1 << 16):
                    pass
            finally:
                writer.close()


def _rubbish(kind: int, rng: random.Random) -> bytes:
    if kind == 0:
        return rng.randbytes(rng.randint(1, 300))
    if kind == 1:  # HTTP/2 frames of random types, flags and lengths.
        frames = b"".join(
            struct.pack(">I", rng.randrange(64))[1:]
            + bytes((rng.randrange(11), rng.randrange(256)))
            + struct.pack(">I", rng.randrange(5))
            + rng.randbytes(rng.randrange(64))
            for _ in range(rng.randint(1, 8))
        )
        return HTTP2_PREFACE + frames
    if kind == 2:
        return rng.randbytes(rng.randint(1, 300)) + b"\r\n\r\n"
    if kind == 3:  # JSON that ends too early, or has a byte changed.
        body = bytearray(json.dumps(completion([1, 2, 3])).encode())
        body[rng.randrange(len(body))] = rng.randrange(256)
        head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + bytes(body[: rng.randint(1, len(body))])
    wrong = rng.choice(
        [
            {"prompt": "x", "n": 10**9},
            {"prompt": [-1]},
            {"prompt": "x", "temperature": "hot"},
            {"prompt": "x" * 100_000},
            {"messages": []},
            [],
        ]
    )
    return http_request("/v1/completions", wrong)
