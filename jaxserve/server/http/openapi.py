"""/openapi.json, made of the endpoints' own types."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

import jaxserve
from jaxserve.server.http import replies
from jaxserve.server.http.endpoints import ENDPOINTS, TEXT, Endpoint
from jaxserve.server.http.service import HttpService

_REFERENCE = "#/components/schemas/{model}"
_JSON = "application/json"
_STATUSES = {
    "400": "A field is wrong: `param` names it",
    "401": "The API key is missing or not known",
    "403": "The Host header names another server, or the API key is not good for this",
    "404": "There is no such path or model",
    "408": "The body came too slowly",
    "409": "There is no room for another adapter",
    "413": "The body is too large",
    "415": "The body is not application/json",
    "429": "The queue is full, or a limit of the key is reached: try again after Retry-After",
    "431": "The headers are too large",
    "500": "The server failed",
    "503": "The server starts, drains or is stuck",
}


async def openapi(_service: HttpService, _: Request) -> Response:
    return JSONResponse(document())


def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document."""
    schemas = _Schemas()
    paths: dict[str, Any] = {}
    for endpoint in ENDPOINTS:
        operation = _operation(endpoint, schemas)
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = operation
    return {
        "openapi": "3.1.0",
        "info": {"title": "jaxserve", "version": jaxserve.__version__},
        "paths": paths,
        "components": {"schemas": schemas.found},
    }


class _Schemas:
    """Schemas by name, and references to them."""

    def __init__(self) -> None:
        bodies = [endpoint.body for endpoint in ENDPOINTS if endpoint.body is not None]
        mode: JsonSchemaMode = "validation"
        _, top = models_json_schema([(body, mode) for body in bodies], ref_template=_REFERENCE)
        self.found: dict[str, Any] = dict(top["$defs"])

    def reply(self, kind: Any) -> dict[str, Any]:
        """A reference to the schema of a reply's type."""
        schema = TypeAdapter(kind).json_schema(ref_template=_REFERENCE)
        # A chat's message is one thing in a request and another in a reply.
        inner = schema.pop("$defs", {})
        name = f"{kind.__name__}Reply"
        self.found[name] = _renamed(schema)
        self.found.update({f"{inner_name}Reply": _renamed(s) for inner_name, s in inner.items()})
        return {"$ref": _REFERENCE.format(model=name)}


def _renamed(schema: Any) -> Any:
    """The schema with references to replies' parts under their own names."""
    if isinstance(schema, dict):
        return {
            key: f"{value}Reply" if key == "$ref" else _renamed(value)
            for key, value in schema.items()
        }
    return [_renamed(item) for item in schema] if isinstance(schema, list) else schema


def _operation(endpoint: Endpoint, schemas: _Schemas) -> dict[str, Any]:
    if endpoint.reply == TEXT:
        content: dict[str, Any] = {TEXT: {"schema": {"type": "string"}}}
    else:
        content = {_JSON: {"schema": schemas.reply(endpoint.reply)}}
    if endpoint.chunk is not None:
        chunk = schemas.reply(endpoint.chunk)["$ref"].rpartition("/")[2]
        content["text/event-stream"] = {
            "schema": {"type": "string", "description": f"Events; each holds a {chunk}"}
        }
    error = {_JSON: {"schema": schemas.reply(replies.Error)}}
    responses: dict[str, Any] = {"200": {"description": "It worked", "content": content}}
    for status, text in _STATUSES.items():
        is_health = endpoint.reply == TEXT and status == "503"
        responses[status] = {"description": text, "content": content if is_health else error}
    operation: dict[str, Any] = {"summary": endpoint.summary, "responses": responses}
    if endpoint.body is not None:
        reference = {"$ref": _REFERENCE.format(model=endpoint.body.__name__)}
        operation["requestBody"] = {"required": True, "content": {_JSON: {"schema": reference}}}
    if "{model}" in endpoint.path:
        operation["parameters"] = [
            {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation
