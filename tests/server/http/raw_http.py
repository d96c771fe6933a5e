"""HTTP by hand, for what no client library sends."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from tests.server.scripted_service import Service

JSON = {"content-type": "application/json"}


def post(
    service: Service, path: str, body: Any, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], Any]:
    """Status, headers and decoded body of the reply. `body` is sent as JSON unless it is bytes."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return ask(service, "POST", path, data, JSON | (headers or {}))


def ask(
    service: Service,
    method: str,
    path: str,
    data: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> tuple[int, dict[str, str], Any]:
    connection = http.client.HTTPConnection("127.0.0.1", service.server.http_port, timeout=10)
    try:
        connection.request(method, path, data, headers or {})
        reply = connection.getresponse()
        raw, fields = reply.read(), {k.lower(): v for k, v in reply.getheaders()}
        is_json = fields.get("content-type") == "application/json"
        return reply.status, fields, json.loads(raw) if is_json else raw.decode()
    finally:
        connection.close()


def connect(service: Service, *, receive_buffer: int | None = None) -> socket.socket:
    end = socket.socket()
    if receive_buffer is not None:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    end.settimeout(10)
    end.connect(("127.0.0.1", service.server.http_port))
    return end


def request_bytes(path: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
