"""`jaxserve eval`: how often a model is right, on tasks with known answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from jaxserve.cli.client_options import (
    ApiKeyFile,
    Tls,
    TlsCa,
    TlsCertificate,
    TlsKey,
    connect,
)
from jaxserve.cli.engine_options import with_engine_options
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.client import Client
    from jaxserve.evaluation.run import Verdict
    from jaxserve.evaluation.task import Item

app = typer.Typer(add_completion=False)

_TASK = "Task"
DEFAULT_CONCURRENCY = 16


@app.command()
@with_engine_options
def evaluate(
    engine_config: EngineConfig,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="A JSONL file (docs/observability.md has the format), or one that comes along: "
            "agreement, facts, words. May be given again.",
            show_default="all that come along",
            metavar="NAME|FILE",
            rich_help_panel=_TASK,
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Only so many items of each task.", rich_help_panel=_TASK),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(min=1, max=256, help="Questions at once.", rich_help_panel=_TASK)
    ] = DEFAULT_CONCURRENCY,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object.", rich_help_panel=_TASK)
    ] = False,
    show_wrong: Annotated[
        bool,
        typer.Option(
            "--show-wrong", help="Print the items that went wrong.", rich_help_panel=_TASK
        ),
    ] = False,
    server: Annotated[
        str | None,
        typer.Option(
            help="gRPC address of a server that runs. Without it one is started for --model.",
            metavar="HOST:PORT",
            rich_help_panel="Server",
        ),
    ] = None,
    api_key_file: ApiKeyFile = None,
    tls: Tls = False,
    tls_ca: TlsCa = None,
    tls_certificate: TlsCertificate = None,
    tls_key: TlsKey = None,
) -> None:
    """Measure how often a model is right, with 95 % intervals.

    Of several choices the model takes the one that it finds most likely; `by byte` divides by a
    choice's length first. Texts that it writes are compared with the answers.

    Examples:
        jaxserve eval
        jaxserve eval --task facts --server 127.0.0.1:50051 --json
        jaxserve eval --task my.jsonl --model ./model.gguf
    """
    from rich.console import Console

    from jaxserve.evaluation.task import find_task, read_task, task_names

    names = task or task_names()
    if len(set(names)) < len(names):
        raise ConfigError("--task: the same task was given twice")
    tasks: dict[str, list[Item]] = {name: read_task(find_task(name))[:limit] for name in names}
    console = Console(stderr=True)
    credentials = (api_key_file, tls, tls_ca, tls_certificate, tls_key)
    with _server(server, engine_config, credentials, console) as client:
        model = client.model_info().weights
        verdicts = {name: _ask_all(client, name, tasks[name], concurrency) for name in names}
    results = {name: _result(verdicts[name]) for name in names}
    if as_json:
        typer.echo(json.dumps({"model": model, "tasks": results}))
    else:
        _print_table(model, results)
    if show_wrong:
        for name in names:
            _print_wrong(name, tasks[name], verdicts[name])


@contextmanager
def _server(
    address: str | None, config: EngineConfig, credentials: tuple[Any, ...], console: Any
) -> Iterator[Client]:
    from jaxserve.loadgen.server_process import changed_options, own_server

    if address is not None:
        if changed := changed_options(config):
            raise ConfigError(f"--server {address} is set up already: leave {changed[0]} out")
        with connect(address, *credentials) as client:
            yield client
        return
    if any(credentials):
        raise ConfigError("keys and TLS are for a server that runs: give --server")
    with ExitStack() as stack:
        with console.status("Starting the server"):
            own = stack.enter_context(own_server(config))
        yield stack.enter_context(connect(own, *credentials))


def _ask_all(client: Client, name: str, items: Sequence[Item], concurrency: int) -> list[Verdict]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from jaxserve.evaluation.run import evaluate as evaluate_items

    console = Console(stderr=True)
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        step = bar.add_task("", total=len(items))
        return evaluate_items(
            client, items, concurrency=concurrency, on_judged=lambda: bar.advance(step)
        )


def _result(verdicts: Sequence[Verdict]) -> dict[str, Any]:
    from jaxserve.evaluation.score import Score

    def values(right: Sequence[bool]) -> dict[str, Any]:
        score = Score.of(right)
        return {
            "accuracy": score.accuracy,
            "interval95": list(score.interval),
            "num_right": score.num_right,
        }

    by_byte = [v.is_right_by_byte for v in verdicts if v.is_right_by_byte is not None]
    return {
        "num_items": len(verdicts),
        **values([verdict.is_right for verdict in verdicts]),
        "by_byte": values(by_byte) if len(by_byte) == len(verdicts) else None,
    }


def _print_table(model: str, results: dict[str, dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=model, title_justify="left")
    for title in ("task", "items", "right", "95 % interval", "by byte"):
        table.add_column(title, justify="left" if title == "task" else "right")
    for name, result in results.items():
        low, high = result["interval95"]
        by_byte = result["by_byte"]
        table.add_row(
            name,
            str(result["num_items"]),
            f"{result['accuracy']:.1%}",
            f"{low:.1%} to {high:.1%}",
            "-" if by_byte is None else f"{by_byte['accuracy']:.1%}",
        )
    Console().print(table)


def _print_wrong(name: str, items: Sequence[Item], verdicts: Sequence[Verdict]) -> None:
    from jaxserve.evaluation.task import ChoiceItem

    for item, verdict in zip(items, verdicts, strict=True):
        if verdict.is_right:
            continue
        if isinstance(item, ChoiceItem):
            asked, wanted = item.context, item.choices[item.answer]
        else:
            asked, wanted = item.prompt, item.answers[0]
        typer.echo(f"{name}: {asked!r}: {verdict.output!r}, not {wanted!r}")
