"""`jaxserve pull`: fetches a catalogued model."""

from __future__ import annotations

import contextlib
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from jaxserve import model_store
from jaxserve.engine.config import EngineConfig
from jaxserve.model_catalog import CATALOG

app = typer.Typer(add_completion=False)


def _complete(incomplete: str) -> list[str]:
    return [name for name in CATALOG if name.startswith(incomplete)]


@app.command()
def pull(
    name: Annotated[
        str, typer.Argument(help="A name that `jaxserve models` lists.", autocompletion=_complete)
    ] = EngineConfig().model,
) -> None:
    """Download a model of the catalogue, check its digest and keep it.

    Every command that takes --model does this at first use; `pull` does it
    ahead, for example before the machine goes offline. Prints the file's path,
    and on standard error what the model's licence asks to be told.

    Example: jaxserve pull smollm2-135m-instruct
    """
    typer.echo(pull_with_progress(name))


def pull_with_progress(name: str) -> str:
    """Pulls behind a progress bar on standard error; returns the file's path.

    Says on standard error what the model's licence asks to be told.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    with contextlib.ExitStack() as stack:
        task = bar.add_task(f"Pulling {name}", total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            if not bar.live.is_started:  # not called at all for a cached model
                stack.enter_context(bar)
            bar.update(task, completed=done_bytes, total=total_bytes)

        path = str(model_store.pull(name, show))
    notice = CATALOG[name.lower()].notice
    if notice:
        typer.echo(notice, err=True)
    return path
