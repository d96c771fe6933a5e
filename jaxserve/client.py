"""A small client of a jaxserve server.

with Client("127.0.0.1:50051") as client:
    for delta in client.generate("Once upon a time", temperature=0, max_tokens=32):
        print(delta.text, end="", flush=True)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message
from grpc_health.v1 import health_pb2, health_pb2_grpc

from jaxserve.engine.request import RequestOutput
from jaxserve.errors import (
    Forbidden,
    InvalidRequest,
    JaxserveError,
    NoRoomForAdapter,
    NotAccepting,
    NotFound,
    NotSupported,
    QueueFull,
    Unauthenticated,
)
from jaxserve.proto.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from jaxserve.server import convert
from jaxserve.server.metadata import FIELD_KEY, REQUEST_ID_KEY
from jaxserve.server.pacing import Pacing

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]
"""Text, token ids, or chat messages (`{"role": ..., "content": ...}`)."""

_Response = TypeVar("_Response")

MAX_MESSAGE_BYTES = 64 << 20
POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of texts, in the order of the texts."""

    vectors: npt.NDArray[np.float32]
    """`[number of texts, E]`."""
    num_tokens: tuple[int, ...]
    """Of each text as it was used."""
    truncated: tuple[bool, ...]
    """Which texts were cut."""


@dataclass(frozen=True, slots=True)
class ClientTls:
    """PEM texts."""

    ca: bytes | None = None
    """Of the CA that the server's certificate is of. None: those of the system."""
    certificate: bytes | None = None
    """The client's own, for a server that asks for one, and its key."""
    key: bytes | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca, self.key, self.certificate)


class Generation:
    """An answer on its way: iterate over its deltas, once.

    Each delta is a `RequestOutput`; the last one has `finish_reason` and
    `usage`. Leaving the `with` block early cancels the request.
    """

    def __init__(self, call: Any) -> None:
        self._call = call

    @property
    def request_id(self) -> str:
        """The server's id of the request; waits until it has one."""
        try:
            metadata = self._call.initial_metadata()
        except grpc.RpcError as error:
            raise _mendable(error) from error
        return next((value for key, value in metadata if key == REQUEST_ID_KEY), "")

    def cancel(self) -> None:
        """Ends the request; iteration then stops without a last delta."""
        self._call.cancel()

    def __iter__(self) -> Iterator[RequestOutput]:
        request_id = ""
        try:
            for response in self._call:
                if not any(field.name != "pad" for field, _ in response.ListFields()):
                    continue  # Stands for no tokens, in a paced stream.
                request_id = request_id or self.request_id
                yield convert.request_output(response, request_id)
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.CANCELLED:
                raise _mendable(error) from error

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.cancel()


class Client:
    """One connection, usable from several threads.

    Raises InvalidRequest (with the field), QueueFull, NotAccepting (also when
    nothing listens), NotSupported (the model cannot do this), NotFound, NoRoomForAdapter,
    Unauthenticated, Forbidden and TimeoutError; any other status stays a grpc.RpcError.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:50051",
        *,
        api_key: str | None = None,
        tls: ClientTls | None = None,
    ) -> None:
        """
        Args:
            api_key: for a server that asks for one.
            tls: for a server that speaks TLS.
        """
        self.address = address
        self._metadata = () if api_key is None else (("authorization", f"Bearer {api_key}"),)
        options = [("grpc.max_receive_message_length", MAX_MESSAGE_BYTES)]
        if tls is None:
            self._channel = grpc.insecure_channel(address, options=options)
        else:
            self._channel = grpc.secure_channel(address, tls.credentials(), options=options)
        self._inference = inference_pb2_grpc.InferenceStub(self._channel)
        self._control = control_pb2_grpc.ControlStub(self._channel)
        self._health: Any = health_pb2_grpc.HealthStub(self._channel)

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout_s: float | None = None,
        request_id: str | None = None,
        cache_salt: str | None = None,
        adapter: str | None = None,
        pacing: Pacing | None = None,
        **settings: Any,
    ) -> Generation:
        """Starts a request. `settings` are fields of `SamplingParams`; `adapter` is the name of
        one that is loaded."""
        request = convert.generate_request(
            prompt,
            request_id=request_id,
            cache_salt=cache_salt,
            adapter=adapter,
            pacing=pacing,
            **settings,
        )
        call = self._inference.Generate(request, timeout=timeout_s, metadata=self._metadata)
        return Generation(call)

    def embed(
        self, texts: Sequence[str], *, truncate: bool = False, timeout_s: float | None = None
    ) -> Embeddings:
        """One vector of each text, from a server whose model is an encoder.

        A text that is longer than the model takes is refused, or cut if `truncate`.
        """
        request = inference_pb2.EmbedRequest(texts=texts, truncate=truncate)
        response = self._unary(self._inference.Embed, request, timeout_s)
        return Embeddings(
            vectors=np.array([entry.values for entry in response.embeddings], np.float32),
            num_tokens=tuple(entry.num_tokens for entry in response.embeddings),
            truncated=tuple(entry.truncated for entry in response.embeddings),
        )

    def tokenize(self, prompt: str | Sequence[Mapping[str, str]]) -> list[int]:
        """The token ids that `generate` would use."""
        request = inference_pb2.TokenizeRequest(**convert.prompt_fields(prompt))
        return list(self._unary(self._inference.Tokenize, request).token_ids)

    def abort(self, request_id: str) -> bool:
        """Ends a request by id. False when no such request runs or waits."""
        request = inference_pb2.AbortRequest(request_id=request_id)
        try:
            response = self._unary(self._inference.Abort, request)
        except NotFound:
            return False
        return bool(response.outcome == inference_pb2.ABORT_OUTCOME_ABORTED)

    def server_info(self, timeout_s: float | None = None) -> control_pb2.GetServerInfoResponse:
        return self._unary(
            self._control.GetServerInfo, control_pb2.GetServerInfoRequest(), timeout_s
        )

    def model_info(self, timeout_s: float | None = None) -> control_pb2.GetModelInfoResponse:
        return self._unary(self._control.GetModelInfo, control_pb2.GetModelInfoRequest(), timeout_s)

    def load(self, timeout_s: float | None = None) -> control_pb2.GetLoadResponse:
        return self._unary(self._control.GetLoad, control_pb2.GetLoadRequest(), timeout_s)

    def load_adapter(self, name: str, path: str) -> control_pb2.Adapter:
        """Has the server load an adapter from a folder below its --lora-dir."""
        request = control_pb2.LoadAdapterRequest(name=name, path=path)
        return self._unary(self._control.LoadAdapter, request).adapter

    def unload_adapter(self, name: str) -> None:
        """New requests of this name are refused from now on."""
        self._unary(self._control.UnloadAdapter, control_pb2.UnloadAdapterRequest(name=name))

    def adapters(self) -> control_pb2.ListAdaptersResponse:
        """Those that are loaded, and how many there is room for."""
        return self._unary(self._control.ListAdapters, control_pb2.ListAdaptersRequest())

    def is_serving(self) -> bool:
        """Whether the health service says SERVING; False when nothing answers."""
        try:
            response = self._health.Check(health_pb2.HealthCheckRequest(), timeout=5)
        except grpc.RpcError:
            return False
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def wait_until_serving(self, timeout_s: float) -> None:
        """Raises TimeoutError when the server is not SERVING by then."""
        end_s = time.monotonic() + timeout_s
        while not self.is_serving():
            if time.monotonic() > end_s:
                raise TimeoutError(f"{self.address} is not serving after {timeout_s:g} s")
            time.sleep(POLL_S)

    def _unary(
        self, method: Callable[..., _Response], request: Message, timeout_s: float | None = None
    ) -> _Response:
        try:
            return method(request, timeout=timeout_s, metadata=self._metadata)
        except grpc.RpcError as error:
            raise _mendable(error) from error

    def close(self) -> None:
        self._channel.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _mendable(error: Any) -> Exception:
    """The exception of ours that a status stands for, or the error itself."""
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.INVALID_ARGUMENT:
        metadata = dict(error.trailing_metadata() or ())
        field = str(metadata.get(FIELD_KEY, "request"))
        return InvalidRequest(field, details.removeprefix(f"{field}: "))
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return TimeoutError(details)
    kinds: dict[Any, type[JaxserveError]] = {
        grpc.StatusCode.RESOURCE_EXHAUSTED: QueueFull,
        grpc.StatusCode.UNAVAILABLE: NotAccepting,
        grpc.StatusCode.UNIMPLEMENTED: NotSupported,
        grpc.StatusCode.UNAUTHENTICATED: Unauthenticated,
        grpc.StatusCode.PERMISSION_DENIED: Forbidden,
        grpc.StatusCode.NOT_FOUND: NotFound,
        grpc.StatusCode.FAILED_PRECONDITION: NoRoomForAdapter,
    }
    return kinds[code](details) if code in kinds else error
