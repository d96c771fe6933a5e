"""HttpService: what every endpoint needs of the server, and the frame around each handler."""

from __future__ import annotations

import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Scope

from jaxserve.engine.request import GenerationRequest
from jaxserve.errors import Forbidden, InvalidRequest
from jaxserve.server.access.door import Door
from jaxserve.server.access.key_ring import AUTHORIZATION_KEY
from jaxserve.server.access.policy import Access
from jaxserve.server.access.tenant import Tenant
from jaxserve.server.http.body import read_body
from jaxserve.server.http.errors import HttpRefusal, reply_to
from jaxserve.server.http.schema import Body, ModelField
from jaxserve.server.metadata import REQUEST_ID_KEY, TRACE_PARENT_KEY
from jaxserve.server.pacing import IMMEDIATE, Pacing
from jaxserve.server.prompt_limits import check_request_id
from jaxserve.server.state import ServerState, Serving

Handler = Callable[[Request], Awaitable[Response]]

_B = TypeVar("_B", bound=Body)


@dataclass(frozen=True, slots=True)
class HttpService:
    state: ServerState
    workers: Executor
    """Tokenise text and parse large bodies."""
    max_body_bytes: int
    body_timeout_s: float
    door: Door
    pacing: Pacing = IMMEDIATE
    """Of all streams; a request can only ask for a coarser one."""
    tool_call_parser: str | None = None
    """Which of `FORMATS` the model's tool calls are read as; without it tools are refused."""
    lora_dir: Path | None = None
    """Below it lie the adapters that clients may have loaded."""

    async def read(self, request: Request, body_class: type[_B]) -> _B:
        """The checked body. Raises InvalidRequest naming the field."""
        return await read_body(
            request,
            body_class,
            max_bytes=self.max_body_bytes,
            timeout_s=self.body_timeout_s,
            workers=self.workers,
        )

    def tenant(self, scope: Scope, access: Access) -> Tenant:
        """Who asks. Raises Unauthenticated or Forbidden."""
        name = AUTHORIZATION_KEY.encode()
        found = next((value for key, value in scope["headers"] if key == name), None)
        header = None if found is None else found.decode("latin-1")
        return self.door.ring.authorize(access, header)

    def claim(self, request: Request, generation: GenerationRequest) -> GenerationRequest:
        """What an HTTP request asks of the engine, as its tenant's."""
        trace_parent = request.headers.get(TRACE_PARENT_KEY, "")
        return self.door.claims.claim(request.state.tenant, generation, trace_parent)

    def accepting(self, body: ModelField) -> Serving:
        """Raises NotAccepting, or HttpRefusal if the body names another model."""
        return _check_model(body, self.state.require_accepting())

    def serving(self, body: ModelField) -> Serving:
        """The same, also while the server drains."""
        return _check_model(body, self.state.require_serving())

    def answering(
        self, handler: Handler, *, access: Access, counts_refusals: bool = False
    ) -> Handler:
        """The handler, whose errors become replies and whose replies carry the request's id. It
        finds who asks in `request.state.tenant`.

        Args:
            access: who may ask.
            counts_refusals: the handler asks for text or embeddings.
        """

        async def handle(request: Request) -> Response:
            request_id = "-"
            try:
                request_id = request_id_of(request)
                request.state.request_id = request_id
                request.state.tenant = self.tenant(request.scope, access)
                response = await handler(request)
                response.headers[REQUEST_ID_KEY] = request_id
                return response
            except Exception as error:
                if counts_refusals or isinstance(error, Forbidden):
                    self.state.note_refusal(error)
                return reply_to(error, request_id).response(request_id)

        return handle


def _check_model(body: ModelField, serving: Serving) -> Serving:
    check_model_name(body.model, serving)
    return serving


def check_model_name(name: str | None, serving: Serving) -> None:
    """Raises HttpRefusal unless it is the model's or an adapter's."""
    names = (serving.card.name, *serving.adapter_names())
    if name is not None and name not in names:
        served = "is" if len(names) == 1 else "are"
        raise HttpRefusal(
            404, "model_not_found", "model", f"is not served here; {', '.join(names)} {served}"
        )


def adapter_of(body: ModelField, serving: Serving) -> str:
    """The adapter that the body names as its model; empty for the model alone."""
    return "" if body.model in (None, serving.card.name) else str(body.model)


def request_id_of(request: Request) -> str:
    """The client's, else a new one. Raises InvalidRequest."""
    given = request.headers.get(REQUEST_ID_KEY)
    return uuid.uuid4().hex if given is None else check_request_id(given, REQUEST_ID_KEY)


def in_client_words(error: InvalidRequest, names: dict[str, str]) -> InvalidRequest:
    """The error with the field's name in the body, for one that the engine names."""
    name = names.get(error.field)
    if isinstance(error, HttpRefusal) or name is None:
        return error
    return InvalidRequest(name, str(error).removeprefix(f"{error.field}: "))
