"""`jaxserve serve`: a model behind gRPC, with metrics on HTTP."""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.cli.engine_options import with_engine_options
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from jaxserve.engine.encoder.startup import RunningEncoder
    from jaxserve.engine.startup import RunningEngine
    from jaxserve.server.config import ServerConfig

app = typer.Typer(add_completion=False)

_SERVER = "Server"
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@app.command()
@with_engine_options
def serve(
    engine_config: EngineConfig,
    host: Annotated[
        str,
        typer.Option(
            help="Interface to listen on. Nothing is encrypted and nobody is asked for a key, "
            "so keep others than the loopback behind a gateway.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    grpc_port: Annotated[
        int, typer.Option(help="Port of gRPC; 0 picks a free one.", rich_help_panel=_SERVER)
    ] = 50051,
    http_port: Annotated[
        int,
        typer.Option(
            help="Port of /metrics (Prometheus) and /health; 0 picks a free one.",
            rich_help_panel=_SERVER,
        ),
    ] = 8000,
    drain_timeout_s: Annotated[
        float,
        typer.Option(
            help="How long running requests may take to finish after SIGTERM or Ctrl-C. A second "
            "signal ends the server at once.",
            rich_help_panel=_SERVER,
        ),
    ] = 30.0,
    watch: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a training run: its newest checkpoint is served, and each newer one "
            "from the moment it is whole. A request runs on one version to its end.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    watch_interval_s: Annotated[
        float,
        typer.Option(
            min=0.1, help="How often --watch looks for a newer one.", rich_help_panel=_SERVER
        ),
    ] = 5.0,
    reflection: Annotated[
        bool,
        typer.Option(
            "--reflection",
            help="Let tools such as grpcurl list the methods.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
) -> None:
    """Serve a model over gRPC: text generation, or embeddings if it is an encoder.

    Prints `READY grpc=HOST:PORT http=HOST:PORT` on stdout once requests are
    served; until then health says NOT_SERVING. SIGTERM drains: no new
    requests, running ones finish, exit code 0 (1 if some had to be cut short).

    Examples:
        jaxserve serve
        jaxserve serve --model ./model.gguf --grpc-port 0 --http-port 0
        jaxserve serve --watch runs/tiny
        jaxserve serve --model all-minilm-l6-v2
    """
    # Imported late: `--help` must not wait for jax.
    from rich.console import Console

    from jaxserve.server.config import ServerConfig

    logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s")
    server_config = ServerConfig(
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        reflection=reflection,
        drain_timeout_s=drain_timeout_s,
    )
    if watch is not None:
        engine_config = _model_of_run(engine_config, watch)
    console = Console(stderr=True, highlight=False)
    if host not in _LOOPBACK:
        console.print(f"warning: {host} may be reached by others; requests are not authenticated")
    drained = asyncio.run(_serve(engine_config, server_config, console, watch, watch_interval_s))
    if not drained:
        console.print(f"some requests were cut short after {drain_timeout_s:g} s")
        raise typer.Exit(1)


def _model_of_run(engine_config: EngineConfig, run: Path) -> EngineConfig:
    if engine_config.model not in (EngineConfig().model, str(run)):
        raise ConfigError(f"--watch serves the model of {run}; leave --model out")
    if not (run / "model.json").is_file():
        raise ConfigError(f"--watch {run}: no training run is there, it holds no model.json")
    return replace(engine_config, model=str(run))


async def _serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    console: Console,
    watch: Path | None,
    watch_interval_s: float,
) -> bool:
    from jaxserve.cli.pull import pull_with_progress
    from jaxserve.model_catalog import CATALOG
    from jaxserve.server.lifecycle import Server, run_until_signal

    server = Server(server_config)

    def start() -> RunningEngine | RunningEncoder:
        # Imports jax, which takes a second: the ports are taken before.
        from jaxserve.cli.startup_view import PhasePrinter
        from jaxserve.engine.encoder.startup import start_encoder
        from jaxserve.engine.startup import start_engine
        from jaxserve.model_store import resolve
        from models.encoder_loading import is_encoder

        if engine_config.model.lower() in CATALOG:
            pull_with_progress(engine_config.model)
        console.print(f"starting {engine_config.model}")
        if watch is None and is_encoder(resolve(engine_config.model)):
            return start_encoder(engine_config, PhasePrinter(console))
        return start_engine(engine_config, PhasePrinter(console))

    def announce(running: RunningEngine | RunningEncoder) -> None:
        from jaxserve.cli.startup_view import print_report
        from jaxserve.engine.startup import RunningEngine

        print_report(console, running.report)
        host = server_config.host
        typer.echo(f"READY grpc={host}:{server.grpc_port} http={host}:{server.http_port}")
        sys.stdout.flush()
        if watch is not None and isinstance(running, RunningEngine):
            from jaxserve.engine.run_watcher import RunWatcher

            def announce_swap(name: str) -> None:
                console.print(f"serving {name}")

            RunWatcher(running.weights, watch, watch_interval_s, announce_swap).start()

    def announce_drain() -> None:
        console.print("draining: running requests finish, new ones are refused")

    return await run_until_signal(server, start, on_ready=announce, on_drain=announce_drain)
