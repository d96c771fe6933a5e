"""`jaxserve adapters`: which adapters a running server has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.client import Client

app = typer.Typer(add_completion=False, no_args_is_help=True)

Address = Annotated[str, typer.Option(help="gRPC address of the server.", metavar="HOST:PORT")]
ApiKeyFile = Annotated[
    Path | None,
    typer.Option(help="File with a key that has the role admin, for a server that asks for one."),
]
TlsCa = Annotated[
    Path | None,
    typer.Option(help="PEM file of the CA, for a server that speaks TLS."),
]
Name = Annotated[str, typer.Argument(help="By which requests choose it.")]
DEFAULT_ADDRESS = "127.0.0.1:50051"


@app.callback()
def _root() -> None:
    """Load adapters into a running server, list and unload them (docs/adapters.md)."""


@app.command(name="list")
def list_adapters(
    address: Address = DEFAULT_ADDRESS, api_key_file: ApiKeyFile = None, tls_ca: TlsCa = None
) -> None:
    """List the adapters that are loaded.

    Examples:
        jaxserve adapters list
    """
    with _client(address, api_key_file, tls_ca) as client:
        reply = client.adapters()
    for one in reply.adapters:
        typer.echo(f"{one.name}  rank {one.rank}  sha256 {one.digest[:16]}  {one.path}")
    room = f"{len(reply.adapters)} of {reply.max_adapters} places taken"
    typer.echo(f"{room}, rank {reply.max_rank} at most", err=True)


@app.command()
def load(
    name: Name,
    path: Annotated[str, typer.Argument(help="Its folder, below the server's --lora-dir.")],
    address: Address = DEFAULT_ADDRESS,
    api_key_file: ApiKeyFile = None,
    tls_ca: TlsCa = None,
) -> None:
    """Load an adapter, or other weights for one. What runs goes on with what it began with.

    Examples:
        jaxserve adapters load sql sql-v2
    """
    with _client(address, api_key_file, tls_ca) as client:
        adapter = client.load_adapter(name, path)
    typer.echo(f"{adapter.name}: rank {adapter.rank}, sha256 {adapter.digest}")


@app.command()
def unload(
    name: Name,
    address: Address = DEFAULT_ADDRESS,
    api_key_file: ApiKeyFile = None,
    tls_ca: TlsCa = None,
) -> None:
    """Refuse new requests for an adapter; its place is free when the last one has ended.

    Examples:
        jaxserve adapters unload sql
    """
    with _client(address, api_key_file, tls_ca) as client:
        client.unload_adapter(name)


@contextmanager
def _client(address: str, api_key_file: Path | None, tls_ca: Path | None) -> Iterator[Client]:
    # Imported late: `--help` must not wait for it.
    from jaxserve.client import Client, ClientTls

    try:
        key = None if api_key_file is None else api_key_file.read_text(encoding="utf-8").strip()
        tls = None if tls_ca is None else ClientTls(tls_ca.read_bytes())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"a file of --api-key-file or --tls-ca cannot be read: {error}") from None
    with Client(address, api_key=key, tls=tls) as client:
        yield client
