"""`jaxserve serve`: a model behind gRPC and an OpenAI-compatible HTTP API."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jaxserve.cli.access_options import (
    AllowUnauthenticated,
    ApiKeysFile,
    FlushMs,
    FlushTokens,
    NoHardening,
    PadBytes,
    StrictPacing,
    TlsCertificate,
    TlsClientCa,
    TlsKey,
    prepare_process,
    tls_files,
)
from jaxserve.cli.engine_options import with_engine_options
from jaxserve.cli.group_options import GroupOptions
from jaxserve.cli.log_format import LogFormat, start_log
from jaxserve.cli.serve_group import (
    LeaderSeat,
    check_follower_options,
    run_follower,
    run_leader,
)
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.group.config import DEFAULT_FOLLOWER_TIMEOUT_S, LEADER_ID
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from jaxserve.engine.encoder.startup import RunningEncoder
    from jaxserve.engine.group.leader import Leader
    from jaxserve.engine.group.liveness import Loss
    from jaxserve.engine.startup import RunningEngine
    from jaxserve.server.config import ServerConfig

app = typer.Typer(add_completion=False)

_SERVER = "Server"
_GROUP = "Several processes"
_OBSERVABILITY = "What can be seen"


@app.command()
@with_engine_options
def serve(
    engine_config: EngineConfig,
    host: Annotated[
        str,
        typer.Option(
            help="Interface to listen on. Others than the loopback need --api-keys-file, "
            "--tls-client-ca or --allow-unauthenticated.",
            rich_help_panel=_SERVER,
        ),
    ] = "127.0.0.1",
    grpc_port: Annotated[
        int, typer.Option(help="Port of gRPC; 0 picks a free one.", rich_help_panel=_SERVER)
    ] = 50051,
    http_port: Annotated[
        int,
        typer.Option(
            help="Port of the OpenAI-compatible API, /metrics (Prometheus) and /health; 0 picks "
            "a free one.",
            rich_help_panel=_SERVER,
        ),
    ] = 8000,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            help="Name under which a gateway on this machine reaches the HTTP port; may be given "
            "again. Others are refused, so that no web page can lead a browser here.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    tool_call_parser: Annotated[
        str | None,
        typer.Option(
            help="How the model writes calls of tools: hermes (also Qwen) or llama3. Without it "
            "requests with tools are refused.",
            metavar="NAME",
            rich_help_panel=_SERVER,
        ),
    ] = None,
    drain_timeout_s: Annotated[
        float,
        typer.Option(
            help="How long running requests may take to finish after SIGTERM or Ctrl-C. A second "
            "signal ends the server at once.",
            rich_help_panel=_SERVER,
        ),
    ] = 30.0,
    lora_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder below which lie the adapters that clients may have loaded at run time "
            "(--max-loras), those with the role admin where keys are asked for.",
            rich_help_panel=_SERVER,
        ),
    ] = None,
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
    processes: Annotated[
        int,
        typer.Option(
            help="Processes on this host that serve the model together, each with its part of the "
            "--mesh; they end with this one (docs/meshes.md).",
            rich_help_panel=_GROUP,
        ),
    ] = 1,
    coordinator: Annotated[
        str | None,
        typer.Option(
            help="For several hosts: where process 0 listens for the others.",
            metavar="HOST:PORT",
            rich_help_panel=_GROUP,
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            help="For several hosts: which process this one is; 0 has the clients.",
            rich_help_panel=_GROUP,
        ),
    ] = None,
    num_processes: Annotated[
        int | None,
        typer.Option(help="For several hosts: how many there are.", rich_help_panel=_GROUP),
    ] = None,
    group_token_file: Annotated[
        Path | None,
        typer.Option(
            help="For several hosts: a file with the secret that they share, mode 0600.",
            rich_help_panel=_GROUP,
        ),
    ] = None,
    follower_timeout_s: Annotated[
        float,
        typer.Option(
            help="A process that gives no sign of life for so long is lost: the server tells "
            "which one, ends its streams as UNAVAILABLE and exits.",
            rich_help_panel=_GROUP,
        ),
    ] = DEFAULT_FOLLOWER_TIMEOUT_S,
    otlp_endpoint: Annotated[
        str | None,
        typer.Option(
            help="Send a trace of each request to this OpenTelemetry collector, by OTLP over HTTP "
            "(docs/observability.md); needs jaxserve[otel].",
            metavar="URL",
            rich_help_panel=_OBSERVABILITY,
        ),
    ] = None,
    log_format: Annotated[
        LogFormat,
        typer.Option(
            help="Of the log on stderr: text, or json for one object a line.",
            rich_help_panel=_OBSERVABILITY,
        ),
    ] = LogFormat.TEXT,
    no_web_page: Annotated[
        bool,
        typer.Option(
            "--no-web-page",
            help="Leave the page at / of the HTTP port out.",
            rich_help_panel=_OBSERVABILITY,
        ),
    ] = False,
    reflection: Annotated[
        bool,
        typer.Option(
            "--reflection",
            help="Let tools such as grpcurl list the methods.",
            rich_help_panel=_SERVER,
        ),
    ] = False,
    api_keys_file: ApiKeysFile = None,
    allow_unauthenticated: AllowUnauthenticated = False,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
    tls_client_ca: TlsClientCa = None,
    no_hardening: NoHardening = False,
    flush_ms: FlushMs = None,
    flush_tokens: FlushTokens = None,
    pad_bytes: PadBytes = None,
    strict_pacing: StrictPacing = False,
) -> None:
    """Serve a model over gRPC and HTTP: text generation, or embeddings if it is an encoder.

    Prints `READY grpc=HOST:PORT http=HOST:PORT` on stdout once requests are
    served; until then health says NOT_SERVING. SIGTERM drains: no new
    requests, running ones finish, exit code 0 (1 if some had to be cut short).

    Examples:
        jaxserve serve
        jaxserve serve --model ./model.gguf --grpc-port 0 --http-port 0
        jaxserve serve --watch runs/tiny
        jaxserve serve --lora sql=adapters/sql --max-loras 4 --lora-dir adapters
        jaxserve serve --model all-minilm-l6-v2
        jaxserve serve --processes 2 --mesh tensor=2
    """
    # Imported late: `--help` must not wait for jax.
    from rich.console import Console

    from jaxserve.server.config import LOOPBACK_HOSTS, ServerConfig
    from jaxserve.server.pacing import Pacing

    start_log(log_format)
    server_config = ServerConfig(
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        allowed_hosts=tuple(allowed_host or ()),
        tool_call_parser=tool_call_parser,
        otlp_endpoint=otlp_endpoint,
        web_page=not no_web_page,
        lora_dir=lora_dir,
        reflection=reflection,
        drain_timeout_s=drain_timeout_s,
        api_keys_file=api_keys_file,
        allow_unauthenticated=allow_unauthenticated,
        tls=tls_files(tls_certificate, tls_key, tls_client_ca),
        pacing=Pacing(flush_ms, flush_tokens, pad_bytes, strict_pacing),
    )
    if lora_dir is not None and not (engine_config.max_loras or engine_config.lora):
        raise ConfigError("--lora-dir needs room for adapters: give --max-loras")
    if watch is not None:
        engine_config = _model_of_run(engine_config, watch)
    console = Console(stderr=True, highlight=False)
    options = GroupOptions(
        processes, coordinator, process_id, num_processes, group_token_file, follower_timeout_s
    )
    group = options.config()
    problems = prepare_process(hardens=not no_hardening)
    if group is not None and watch is not None:
        raise ConfigError("--watch does not work with several processes yet: leave one out")
    if group is not None and group.process_id != LEADER_ID:
        check_follower_options(group.process_id, engine_config, server_config)
        run_follower(group, engine_config, console)
    if host not in LOOPBACK_HOSTS and not server_config.asks_who:
        console.print(f"warning: {host} may be reached by others; requests are not authenticated")
    if host not in LOOPBACK_HOSTS and server_config.tls is None:
        console.print(f"warning: what {host} sends and gets is not encrypted (--tls-certificate)")

    def run(seat: LeaderSeat | None) -> int:
        # What start-up makes stays: looking through it for garbage, again and again, costs 0.4 s.
        gc.disable()
        try:
            drained = asyncio.run(
                _serve(
                    engine_config, server_config, console, watch, watch_interval_s, seat, problems
                )
            )
        finally:
            gc.enable()  # If it was not READY, when `announce` does.
        if not drained:
            console.print(f"some requests were cut short after {drain_timeout_s:g} s")
        return 0 if drained else 1

    if group is not None:
        seat = LeaderSeat.take(group, engine_config)
        run_leader(lambda: run(seat))
    if (code := run(None)) != 0:
        raise typer.Exit(code)


def _model_of_run(engine_config: EngineConfig, run: Path) -> EngineConfig:
    if engine_config.model not in (EngineConfig().model, str(run)):
        raise ConfigError(f"--watch serves the model of {run}; leave --model out")
    if not (run / "model.json").is_file():
        raise ConfigError(f"--watch {run}: no training run is there, it holds no model.json")
    return replace(engine_config, model=str(run))


def _encodes(path: Path) -> bool:
    """Whether a model makes vectors or labels, not text."""
    from models.encoder_loading import is_encoder

    if is_encoder(path):
        return True
    if not path.is_dir():
        return False
    # A classifier is a folder; what knows of them takes half a second to import.
    from jaxserve.xc.model_folder import is_xc_model

    return is_xc_model(path)


async def _serve(
    engine_config: EngineConfig,
    server_config: ServerConfig,
    console: Console,
    watch: Path | None,
    watch_interval_s: float,
    seat: LeaderSeat | None,
    problems: Sequence[str],
) -> bool:
    from jaxserve.cli.pull import pull_with_progress
    from jaxserve.model_catalog import CATALOG
    from jaxserve.server.lifecycle import Server, run_until_signal

    server = Server(server_config)
    leader: Leader | None = None
    loop = asyncio.get_running_loop()
    lost: asyncio.Future[str] = loop.create_future()

    def lose(why: str) -> None:
        server.end_streams(why)
        lost.set_result(why)

    def on_loss(loss: Loss) -> None:
        # The engine's thread hears of it after this, so what it says comes later, too.
        loop.call_soon_threadsafe(lose, loss.message)

    def start() -> RunningEngine | RunningEncoder:
        # Imports jax, which takes a second: the ports are taken before.
        from jaxserve.cli.startup_view import PhasePrinter
        from jaxserve.engine.startup import start_engine
        from jaxserve.model_store import resolve

        if engine_config.model.lower() in CATALOG:
            pull_with_progress(engine_config.model)
        console.print(f"starting {engine_config.model}")
        if watch is None and seat is None and _encodes(Path(resolve(engine_config.model))):
            from jaxserve.engine.encoder.startup import start_encoder

            return start_encoder(engine_config, PhasePrinter(console))
        nonlocal leader
        leader = None if seat is None else seat.leader(on_loss)
        return start_engine(engine_config, PhasePrinter(console), leader=leader)

    def announce(running: RunningEngine | RunningEncoder) -> None:
        from jaxserve.cli.startup_view import print_report
        from jaxserve.engine.startup import RunningEngine

        print_report(console, running.report)
        # Later collections leave out what there is by now. One over all of jax's objects would
        # hold up a step for 0.1 s.
        gc.freeze()
        gc.enable()
        for problem in problems:
            console.print(f"warning: {problem}")
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

    try:
        return await run_until_signal(
            server, start, on_ready=announce, on_drain=announce_drain, lost=lost
        )
    finally:
        if leader is not None:
            leader.end()
