"""A request's body: read within limits of size and time, then checked against its class."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from pydantic import ValidationError
from starlette.requests import Request

from jaxserve.server.http import schema
from jaxserve.server.http.errors import HttpRefusal

LARGE_BYTES = 64 << 10
"""A body above this is parsed in a worker thread, so that it delays nobody's stream."""
MAX_SHOWN_CHARS = 64
"""Of a field's name that a client made up."""

_B = TypeVar("_B", bound=schema.Body)

_FIELD_NAMES = frozenset(
    name
    for value in vars(schema).values()
    if isinstance(value, type) and issubclass(value, schema.Body)
    for own_name, info in value.model_fields.items()
    for name in (own_name, info.alias or own_name)
)


async def read_body(
    request: Request,
    body_class: type[_B],
    *,
    max_bytes: int,
    timeout_s: float,
    workers: Executor,
) -> _B:
    """The body as a `body_class`. Raises InvalidRequest naming the field."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise HttpRefusal(
            415, "unsupported_media_type", "content-type", "send JSON as application/json"
        )
    try:
        async with asyncio.timeout(timeout_s):
            data = await _read(request, max_bytes)
    except TimeoutError:
        raise HttpRefusal(
            408, "body_too_slow", "body", f"did not come within {timeout_s:g} s"
        ) from None
    if len(data) <= LARGE_BYTES:
        return _parse(data, body_class)
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(workers, _parse, data, body_class)


async def _read(request: Request, max_bytes: int) -> bytes:
    data = bytearray()
    async for piece in request.stream():
        data += piece
        if len(data) > max_bytes:
            raise HttpRefusal(
                413, "body_too_large", "body", f"at most {max_bytes} bytes are allowed"
            )
    return bytes(data)


def _parse(data: bytes, body_class: type[_B]) -> _B:
    try:
        return body_class.model_validate_json(data)
    except ValidationError as error:
        # Without the input and without the library's links.
        found = error.errors(include_url=False, include_input=False, include_context=False)
    raise _refusal([(_path(entry), entry["type"], entry["msg"]) for entry in found])


def _refusal(found: Sequence[tuple[str, str, str]]) -> HttpRefusal:
    """What to say of the first field that is wrong; a union gives an entry for each member."""
    field, kind, message = found[0]
    if kind == "json_invalid":
        return HttpRefusal(400, "invalid_json", "body", "is not JSON that this server reads")
    instead = schema.REFUSED_FIELDS.get(field.partition(".")[0])
    if instead is not None:
        return HttpRefusal(400, "unsupported_parameter", field, f"is not supported here: {instead}")
    if kind == "extra_forbidden":
        return HttpRefusal(400, "unknown_parameter", field, "is unknown: see /openapi.json")
    if kind == "missing":
        return HttpRefusal(400, "missing_required_parameter", field, "is missing")
    causes = dict.fromkeys(text for path, _, text in found if path == field)
    code = "invalid_type" if kind.endswith(("_type", "_parsing")) else "invalid_value"
    return HttpRefusal(400, code, field, ", or: ".join([message, *list(causes)[1:]]))


def _path(entry: Any) -> str:
    """`messages[2].content` of an error's place, without the names of a union's members."""
    parts = entry["loc"]
    made_up = entry["type"] == "extra_forbidden"
    path = ""
    for index, part in enumerate(parts):
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in _FIELD_NAMES or (made_up and index == len(parts) - 1):
            path += f".{part[:MAX_SHOWN_CHARS]}" if path else part[:MAX_SHOWN_CHARS]
    return path or "body"
