"""`jaxserve bench serve`: an open-loop load on a server, measured at the socket."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from jaxserve.cli.engine_options import with_engine_options
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.loadgen.records import LoadRecord
    from jaxserve.loadgen.schedule import LoadShape
    from jaxserve.proto.v1 import control_pb2

_LOAD = "Load"
_ARRIVALS = "Arrivals"
_GOALS = "Goals"
VOID_EXIT_CODE = 3


@with_engine_options
def serve(
    engine_config: EngineConfig,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A running server. Without it one is started for the run, with the engine "
            "options below.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Holds the API key, alone, that --server asks for. It is never given on the "
            "command line, which other processes can read.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    qps: Annotated[
        float | None,
        typer.Option(
            help="Requests a second.",
            show_default="1, or the trace's own rate in a replay",
            rich_help_panel=_ARRIVALS,
        ),
    ] = None,
    arrivals: Annotated[
        str, typer.Option(help="poisson, gamma or replay.", rich_help_panel=_ARRIVALS)
    ] = "poisson",
    burstiness: Annotated[
        float,
        typer.Option(
            help="Of gamma arrivals: variance of the gaps over their squared mean.",
            rich_help_panel=_ARRIVALS,
        ),
    ] = 1.0,
    ramp_s: Annotated[
        float,
        typer.Option(
            help="Seconds in which the rate rises from zero; requests due then are not measured.",
            rich_help_panel=_ARRIVALS,
        ),
    ] = 0.0,
    num_requests: Annotated[
        int, typer.Option(min=1, help="Requests to send.", rich_help_panel=_LOAD)
    ] = 100,
    workload: Annotated[
        str,
        typer.Option(
            help="Lengths as in a published trace: sharegpt, azure_conv, azure_code or arxiv, "
            "scaled down to the server's context.",
            rich_help_panel=_LOAD,
        ),
    ] = "sharegpt",
    trace: Annotated[
        Path | None,
        typer.Option(
            metavar="CSV",
            help="num_prefill_tokens, num_decode_tokens and, for a replay, arrived_at; in place "
            "of --workload and scaled likewise.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    input_len: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Prompt tokens of every request, with --output-len in place of --workload.",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    output_len: Annotated[
        int | None,
        typer.Option(min=1, help="Output tokens of every request.", rich_help_panel=_LOAD),
    ] = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Of lengths, gaps and prompts.", rich_help_panel=_LOAD)
    ] = 0,
    goal_ttft_ms: Annotated[
        float | None,
        typer.Option(
            help="Longest time to a first token. Goodput counts the requests that keep the goals.",
            show_default="--slo-ttft-ms",
            rich_help_panel=_GOALS,
        ),
    ] = None,
    goal_tbt_ms: Annotated[
        float | None,
        typer.Option(
            help="Longest time between tokens, of a request's own P99.",
            show_default="--slo-tbt-ms",
            rich_help_panel=_GOALS,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Send requests on time to a server, whatever it answers, and time the answers.

    The loop is open: arrivals never wait for the server. All times are taken at
    the client's socket, the scheduling delay comes from the server. A generator
    that could not keep its schedule voids the run: exit code 3.

    Example: jaxserve bench serve --server 127.0.0.1:50051 --qps 2 --goal-tbt-ms 100
    """
    from jaxserve.loadgen.schedule import LoadShape
    from jaxserve.loadgen.slo import ServiceLevel
    from jaxserve.loadgen.summary import summarize
    from jaxserve.simulator.arrivals import ArrivalProcess
    from jaxserve.simulator.workloads import Lengths

    if api_key_file is not None and server is None:
        raise ConfigError("--api-key-file is for --server: a server of the run's own asks for none")
    api_key = None if api_key_file is None else read_api_key(api_key_file)
    if (input_len is None) != (output_len is None):
        raise ConfigError("--input-len and --output-len go together")
    shape = LoadShape(
        num_requests=num_requests,
        qps=qps if qps is not None or arrivals == "replay" else 1.0,
        arrivals=ArrivalProcess(arrivals, burstiness),
        workload=workload,
        trace=trace,
        fixed_lengths=None
        if input_len is None or output_len is None
        else Lengths(input_len, output_len),
        ramp_s=ramp_s,
        seed=seed,
    )
    level = ServiceLevel.of_ms(
        ttft_ms=goal_ttft_ms or engine_config.slo_ttft_ms,
        tbt_ms=goal_tbt_ms or engine_config.slo_tbt_ms,
    )
    with _server(server, engine_config) as address:
        info, run = _measure(address, shape, api_key)
    summary = {
        "benchmark": "serve",
        "load": _load_values(shape),
        "server": {"address": address, **_server_values(info)},
        **summarize(run, level, seed=seed),
    }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print_table(summary)
    _judge(summary)


@contextmanager
def _server(address: str | None, config: EngineConfig) -> Iterator[str]:
    from jaxserve.loadgen.server_process import changed_options, own_server

    if address is not None:
        if changed := changed_options(config):
            raise ConfigError(
                f"--server {address} is set up already: {changed[0]} is for a server that the "
                "benchmark starts itself"
            )
        yield address
        return
    with Console(stderr=True).status("Starting the server"), own_server(config) as own:
        yield own


def read_api_key(path: Path) -> str:
    """The only line of a file. Raises ConfigError, which never repeats it."""
    try:
        key = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--api-key-file {path} cannot be read ({type(error).__name__}): give a text file that "
            "holds one key"
        ) from None
    if not key or any(not " " < letter < "\x7f" for letter in key):
        raise ConfigError(f"--api-key-file {path} must hold one key and nothing else")
    return key


def _measure(
    address: str, shape: LoadShape, api_key: str | None
) -> tuple[control_pb2.GetModelInfoResponse, LoadRecord]:
    from jaxserve.client import Client
    from jaxserve.loadgen.generator import run_open_loop
    from jaxserve.loadgen.schedule import make_schedule

    with Client(address, api_key=api_key) as client:
        info = client.model_info()
    schedule = make_schedule(shape, info.max_model_len)
    console = Console(stderr=True)
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn())
    # One refresh a second: the terminal must not take the generator's time.
    with Progress(
        *columns, console=console, refresh_per_second=1, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=len(schedule))
        run = run_open_loop(
            address,
            schedule,
            vocab_size=info.vocab_size,
            seed=shape.seed,
            api_key=api_key,
            on_finished=lambda: bar.advance(task),
        )
    return info, run


def _load_values(shape: LoadShape) -> dict[str, Any]:
    fixed = shape.fixed_lengths
    return {
        "qps": shape.qps,
        "arrivals": shape.arrivals.kind,
        "burstiness": shape.arrivals.burstiness,
        "ramp_s": shape.ramp_s,
        "workload": None if shape.trace or fixed else shape.workload,
        "trace": None if shape.trace is None else str(shape.trace),
        "fixed_lengths": None if fixed is None else list(fixed),
        "seed": shape.seed,
    }


def _server_values(info: control_pb2.GetModelInfoResponse) -> dict[str, Any]:
    return {
        "model": info.name,
        "dtype": info.dtype,
        "policy": info.policy,
        "token_budget": info.token_budget,
        "buckets": list(info.buckets),
        "max_num_seqs": info.max_num_seqs,
        "max_model_len": info.max_model_len,
        "num_pages": info.num_pages,
    }


def _judge(summary: dict[str, Any]) -> None:
    """Exit code 3 for a void run, 1 if requests failed."""
    generator = summary["generator"]
    if generator["void"]:
        for reason in generator["void_reasons"]:
            typer.secho(f"void: {reason}", fg="red", err=True)
        typer.secho(
            "the run says nothing about the server: lower --qps, or give the generator a core "
            "of its own",
            fg="red",
            err=True,
        )
        raise typer.Exit(VOID_EXIT_CODE)
    if summary["num_failed"]:
        typer.secho(
            f"error: {summary['num_failed']} requests failed: {summary['status']}",
            fg="red",
            err=True,
        )
        raise typer.Exit(1)


def _print_table(summary: dict[str, Any]) -> None:
    server, generator = summary["server"], summary["generator"]
    table = Table(
        title=f"{server['model']}, {server['dtype']}, {server['policy']}, token budget "
        f"{server['token_budget']}",
        title_justify="left",
    )
    table.add_column("")
    for column in ("mean", "P50", "P90", "P99", "max", "95 % interval of P99"):
        table.add_column(column, justify="right")
    for key, label in (
        ("ttft_ms", "time to first token, ms"),
        ("tpot_ms", "time per output token, ms"),
        ("tbt_ms", "between tokens, ms"),
        ("e2e_ms", "whole request, ms"),
        ("scheduling_delay_ms", "scheduling delay, ms"),
    ):
        values = summary[key]
        if values is None:
            table.add_row(label, *["-"] * 6)
            continue
        cells = [f"{values[name]:.4g}" for name in ("mean", "p50", "p90", "p99", "max")]
        low, high = values["ci95"]["p99"]
        table.add_row(label, *cells, f"{low:.4g} to {high:.4g}")
    console = Console()
    console.print(table)
    console.print(
        f"{summary['num_requests']} requests, {summary['offered_qps']:.3g}/s offered, "
        f"{summary['requests_per_s']:.3g}/s and {summary['output_tokens_per_s']:.4g} output "
        f"tokens/s served, {summary['num_failed']} failed"
    )
    goodput = summary["goodput"]
    if goodput is not None:
        console.print(
            f"goodput {goodput['requests_per_s']:.3g} requests/s: {goodput['attainment']:.1%} "
            "kept the goals"
        )
    console.print(
        f"generator: {generator['cpu_share']:.1%} of a core, {generator['late_fraction']:.1%} "
        f"sent late, {generator['lateness_max_s'] * 1e3:.3g} ms at most"
    )
