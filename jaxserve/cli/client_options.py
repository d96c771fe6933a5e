"""Options of commands that ask a running server: where it is, and how it knows who asks."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.client import Client

_SERVER = "Server"

ServerAddress = Annotated[
    str,
    typer.Option(help="gRPC address of the server.", metavar="HOST:PORT", rich_help_panel=_SERVER),
]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(
        help="File that holds an API key, for a server that asks for one.",
        rich_help_panel=_SERVER,
    ),
]
Tls = Annotated[
    bool,
    typer.Option(
        "--tls",
        help="The server speaks TLS, with a certificate that this system trusts.",
        rich_help_panel=_SERVER,
    ),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(
        help="The server speaks TLS, with a certificate of the CA in this PEM file.",
        rich_help_panel=_SERVER,
    ),
]
TlsCertificate = Annotated[
    Path | None,
    typer.Option(
        help="PEM file of this client's certificate, for a server that asks for one.",
        rich_help_panel=_SERVER,
    ),
]
TlsKey = Annotated[Path | None, typer.Option(help="PEM file of its key.", rich_help_panel=_SERVER)]

DEFAULT_SERVER = "127.0.0.1:50051"


def connect(
    server: str,
    api_key_file: Path | None,
    tls: bool,
    tls_ca: Path | None,
    tls_certificate: Path | None,
    tls_key: Path | None,
) -> Client:
    """A client of the server. Raises ConfigError if a file cannot be read or one is missing."""
    from jaxserve.client import Client, ClientTls

    if (tls_certificate is None) != (tls_key is None):
        raise ConfigError("--tls-certificate and --tls-key go together")
    key = _read("--api-key-file", api_key_file)
    of_tls = None
    if tls or tls_ca is not None or tls_certificate is not None:
        of_tls = ClientTls(
            _read("--tls-ca", tls_ca),
            _read("--tls-certificate", tls_certificate),
            _read("--tls-key", tls_key),
        )
    return Client(server, api_key=None if key is None else _key(key), tls=of_tls)


def _key(text: bytes) -> str:
    try:
        key = text.decode("ascii").strip()
    except UnicodeDecodeError:
        key = ""
    if not key or not key.isprintable() or " " in key:
        raise ConfigError("--api-key-file must hold one key and nothing else")
    return key


def _read(option: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{option} {path}: {error.strerror or error}") from error
