"""ServerConfig: ports and limits of the front end."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from jaxserve.errors import ConfigError, InvalidRequest
from jaxserve.server.pacing import IMMEDIATE, Pacing
from jaxserve.server.tls import TlsFiles
from jaxserve.server.tool_calls.formats import FORMATS

MIB = 1 << 20
LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Validated on construction; a message names the flag to change."""

    host: str = "127.0.0.1"
    """Interface to listen on. Any other than the loopback needs keys, client certificates, or
    `allow_unauthenticated`."""
    grpc_port: int = 50051
    """0 picks a free port."""
    http_port: int = 8000
    """Of the OpenAI-compatible API, `/metrics` and `/health`; 0 picks a free port."""
    allowed_hosts: tuple[str, ...] = ()
    """Names that the HTTP Host header may have beside the loopback's and `host`.
    On another interface than the loopback any name may, unless some are given."""
    api_keys_file: Path | None = None
    """Who may send requests (`jaxserve.server.access.key_file`). None: whoever reaches a port."""
    allow_unauthenticated: bool = False
    """Open an interface beyond the loopback to whoever reaches it."""
    tls: TlsFiles | None = None
    """Of both ports. None: nothing is encrypted."""
    pacing: Pacing = IMMEDIATE
    """Of all streams; a request can only ask for a coarser one."""
    otlp_endpoint: str | None = None
    """URL of a collector of traces. None: there are none."""
    web_page: bool = True
    """A chat and charts of the load at `/`."""
    reflection: bool = False
    """Let clients such as grpcurl list the methods."""
    drain_timeout_s: float = 30.0
    """How long running requests may take to finish after SIGTERM."""
    max_message_bytes: int = 4 * MIB
    """Of a message that a client sends, or the body of its HTTP request."""
    max_metadata_bytes: int = 8 << 10
    """Of a call, or the head of an HTTP request."""
    max_concurrent_streams: int = 2048
    """Calls at once on one connection. Above the engine's slots and queue, so
    that overload is answered by the queue's own status."""
    max_concurrent_calls: int = 4096
    """Calls at once on all connections, and HTTP connections at once."""
    http_head_timeout_s: float = 10.0
    """For the head of an HTTP request to come."""
    http_body_timeout_s: float = 30.0
    """For its body."""
    http_stall_timeout_s: float = 60.0
    """An HTTP client that takes nothing of its reply for so long is cut off."""
    tool_call_parser: str | None = None
    """How the model writes calls of tools, one of `FORMATS`. Without it tools are refused."""
    lora_dir: Path | None = None
    """Below it lie the adapters that clients may have loaded. None: they may have none loaded."""
    max_connection_age_s: float | None = None
    """Close connections after this time, so that clients balance anew."""
    degraded_after_s: float = 60.0
    """A device that is at one step for this long is not healthy."""

    def __post_init__(self) -> None:
        for name in ("grpc_port", "http_port"):
            port = getattr(self, name)
            if not 0 <= port <= 65535:
                flag = f"--{name.replace('_', '-')}"
                raise ConfigError(f"{flag} must be in [0, 65535] (0: any free port), not {port}")
        if self.grpc_port == self.http_port != 0:
            raise ConfigError(f"--grpc-port and --http-port are both {self.grpc_port}: change one")
        if not 0 <= self.drain_timeout_s < float("inf"):
            raise ConfigError(f"--drain-timeout-s must not be negative, not {self.drain_timeout_s}")
        if self.tool_call_parser not in (None, *FORMATS):
            raise ConfigError(
                f"--tool-call-parser must be one of {', '.join(FORMATS)}, not "
                f"{self.tool_call_parser!r}"
            )
        if self.otlp_endpoint is not None and not _is_http_url(self.otlp_endpoint):
            raise ConfigError(
                "--otlp-endpoint must be a URL such as http://127.0.0.1:4318, not "
                f"{self.otlp_endpoint!r}"
            )
        if self.lora_dir is not None and not self.lora_dir.is_dir():
            raise ConfigError(f"--lora-dir {self.lora_dir} is no folder")
        if not self.host:
            raise ConfigError("--host must be an address, e.g. 127.0.0.1")
        try:
            self.pacing.validate(_pacing_flag)
        except InvalidRequest as error:
            raise ConfigError(str(error)) from None
        if self.host not in LOOPBACK_HOSTS and not (self.asks_who or self.allow_unauthenticated):
            raise ConfigError(
                f"--host {self.host} may be reached by others, and nobody would be asked for a "
                "key: give --api-keys-file (`jaxserve keys new` makes keys) or --tls-client-ca, or "
                "say --allow-unauthenticated if a gateway in front asks"
            )

    @property
    def asks_who(self) -> bool:
        """Whether a client has to show a key or a certificate."""
        return self.api_keys_file is not None or (
            self.tls is not None and self.tls.client_ca is not None
        )


def _is_http_url(text: str) -> bool:
    try:
        url = urlsplit(text)
        return url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
    except ValueError:
        return False


def _pacing_flag(field: str) -> str:
    return "--strict-pacing" if field == "strict" else f"--{field.replace('_', '-')}"
