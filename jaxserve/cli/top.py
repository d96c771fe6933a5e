"""`jaxserve top`: what a running server does, live in this terminal."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.client_options import (
    DEFAULT_SERVER,
    ApiKeyFile,
    ServerAddress,
    Tls,
    TlsCa,
    TlsCertificate,
    TlsKey,
    connect,
)
from jaxserve.errors import ConfigError, NotAccepting

if TYPE_CHECKING:
    from jaxserve.client import Client
    from jaxserve.proto.v1 import control_pb2 as pb

app = typer.Typer(add_completion=False)

TIMEOUT_S = 10.0
"""For an answer of the server."""


@dataclass(frozen=True, slots=True)
class Sample:
    """What the server told at one time."""

    at_s: float
    server: pb.GetServerInfoResponse
    model: pb.GetModelInfoResponse
    load: pb.GetLoadResponse


@app.command()
def top(
    server: ServerAddress = DEFAULT_SERVER,
    interval_s: Annotated[
        float, typer.Option(min=0.1, help="Seconds that a window of figures covers.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show one window and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: one JSON object.")] = False,
    api_key_file: ApiKeyFile = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
) -> None:
    """Watch a running server: requests, queue, KV cache, steps, tokens a second, latencies.

    Figures are of the last window. On a server with API keys the key needs the role metrics.
    Ctrl-C ends.

    Examples:
        jaxserve top
        jaxserve top --once --json
        jaxserve top --server HOST:50051 --tls-ca ca.pem --api-key-file key.txt
    """
    from rich.console import Console

    if as_json and not once:
        raise ConfigError("--json goes with --once")
    console = Console()
    if not once and not console.is_terminal:
        raise ConfigError("this is no terminal to show a live view in: add --once")
    with connect(server, api_key_file, tls, tls_ca, tls_certificate, tls_key) as client:
        if once:
            _show_once(client, interval_s, console, as_json)
        else:
            _watch(client, interval_s, console)


def take_sample(client: Client) -> Sample:
    """Raises NotAccepting while the server starts or when it does not answer, and TimeoutError."""
    server, model = client.server_info(TIMEOUT_S), client.model_info(TIMEOUT_S)
    load = client.load(TIMEOUT_S)
    return Sample(time.monotonic(), server, model, load)


def _show_once(client: Client, interval_s: float, console: Any, as_json: bool) -> None:
    from jaxserve.cli.top_view import as_values, screen
    from jaxserve.load_window import LoadWindow

    try:
        before = take_sample(client)
        time.sleep(interval_s)
        after = take_sample(client)
    except TimeoutError:
        raise NotAccepting(_silent(client)) from None
    window = LoadWindow.between(before.load, after.load, after.at_s - before.at_s)
    if as_json:
        typer.echo(json.dumps(as_values(after, window)))
    else:
        console.print(screen(after, window, [window.output_tokens_per_s]))


def _watch(client: Client, interval_s: float, console: Any) -> None:
    """Goes on through restarts of the server, until Ctrl-C."""
    from collections import deque

    from rich.live import Live
    from rich.text import Text

    from jaxserve.cli.top_view import MAX_HISTORY, screen
    from jaxserve.load_window import LoadWindow

    history: deque[float] = deque(maxlen=MAX_HISTORY)
    before: Sample | None = None
    try:
        with Live(Text("connecting"), console=console, screen=True, auto_refresh=False) as live:
            while True:
                try:
                    after = take_sample(client)
                    window = None
                    if before is not None:
                        window_s = after.at_s - before.at_s
                        window = LoadWindow.between(before.load, after.load, window_s)
                        history.append(window.output_tokens_per_s)
                    live.update(screen(after, window, history), refresh=True)
                    before = after
                except (NotAccepting, TimeoutError) as error:
                    before = None
                    live.update(Text(str(error) or _silent(client)), refresh=True)
                time.sleep(interval_s)
    except KeyboardInterrupt:
        return


def _silent(client: Client) -> str:
    return f"{client.address} does not answer within {TIMEOUT_S:g} s"
