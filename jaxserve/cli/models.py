"""`jaxserve models`: the catalogue and what of it is downloaded."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from jaxserve import model_store

app = typer.Typer(add_completion=False)


def _complete_cached(incomplete: str) -> list[str]:
    names = [item.entry.name for item in model_store.list_models() if item.cached]
    return [name for name in names if name.startswith(incomplete)]


@app.callback(invoke_without_command=True)
def models(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON list, for programs.")] = False,
) -> None:
    """List the models that can be given by name, or remove a downloaded one.

    Examples: jaxserve models, jaxserve models remove smollm2-135m-instruct
    """
    if context.invoked_subcommand is not None:
        return
    listings = model_store.list_models()
    if as_json:
        typer.echo(json.dumps([_as_record(item) for item in listings], indent=2))
        return
    for item in listings:
        typer.echo(f"{item.entry.name}  {item.entry.description} ({item.entry.licence})")
        if item.path is not None:
            typer.echo(f"  downloaded: {item.path} ({item.entry.file_bytes / 1e6:.0f} MB)")
        else:
            size = item.entry.download_bytes / 1e6
            typer.echo(f"  not downloaded ({size:.0f} MB): jaxserve pull {item.entry.name}")


@app.command()
def remove(
    name: Annotated[
        str, typer.Argument(help="A downloaded model.", autocompletion=_complete_cached)
    ],
) -> None:
    """Delete a downloaded model's files. `jaxserve pull` brings them back."""
    freed_bytes = model_store.remove(name)
    if freed_bytes:
        typer.echo(f"removed {name}: {freed_bytes / 1e6:.0f} MB freed")
    else:
        typer.echo(f"{name} was not downloaded: nothing to remove")


def _as_record(item: model_store.ModelListing) -> dict[str, object]:
    return {
        "name": item.entry.name,
        "description": item.entry.description,
        "licence": item.entry.licence,
        "source": item.entry.source,
        "download_bytes": item.entry.download_bytes,
        "path": str(item.path) if item.path is not None else None,
    }
