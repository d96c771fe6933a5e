"""The `jaxserve` command: one module a sub-command, loaded when it is run.

Importing this module imports neither jax nor any sub-command, so `--help`,
`--version` and shell completion answer at once. A sub-command `name` is the
module `jaxserve.cli.name`, which holds `app = typer.Typer(add_completion=False)`:
with one `@app.command()` it is a plain command, with several a group.
"""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

import jaxserve
from jaxserve.errors import JaxserveError

if TYPE_CHECKING:
    from collections.abc import Callable

SUMMARIES = {
    "serve": "Serve a model over gRPC.",
    "adapters": "Load adapters into a server, list and unload them.",
    "keys": "Make API keys for a server.",
    "top": "Watch a running server, live in this terminal.",
    "chat": "Talk with a model, in this terminal.",
    "generate": "Complete a prompt, or a file of prompts, without a server.",
    "embed": "Turn texts into vectors, without a server.",
    "classify": "Give texts labels, and measure a run of extreme classification.",
    "bench": "Measure throughput and latency on this machine.",
    "eval": "Measure how often a model is right, on tasks with known answers.",
    "data": "Prepare training data, and look into it.",
    "train": "Train a model: stopped, killed, moved or resized, it goes on with the same bits.",
    "simulate": "Try schedulers on published models and workloads, in virtual time.",
    "checkpoint": "Convert, verify and compare models on disk.",
    "pull": "Download a model of the catalogue.",
    "models": "List and remove downloaded models.",
    "doctor": "Tell what this machine can do and what is missing.",
}
"""Sub-command -> its line in `jaxserve --help`, in the order shown."""


class LazyGroup(TyperGroup):
    """Knows its sub-commands by name; loads a module when it is run."""

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None:
            module = importlib.import_module(f"jaxserve.cli.{name}")
            command = typer.main.get_command(module.app)
        return name, command, rest


app = typer.Typer(
    cls=LazyGroup,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=(
        "Two to start with: `jaxserve chat` pulls a small model and talks to it; "
        "`jaxserve serve` puts it behind gRPC on 127.0.0.1. "
        "`jaxserve COMMAND --help` explains a command, with examples."
    ),
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"jaxserve {jaxserve.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Serve language models with JAX: fixed-shape steps, compiled ahead of time."""


def _placeholder() -> Callable[[], None]:
    def run() -> None:
        raise AssertionError("LazyGroup replaces this command before it runs")

    return run


for _name, _summary in SUMMARIES.items():
    app.command(_name, help=_summary)(_placeholder())


def is_user_error(error: Exception) -> bool:
    """Whether the message alone tells the user what to mend.

    `models` and `checkpoint` cannot import JaxserveError; their own subclasses
    of ValueError mean the same, and so does an OSError from reading a model. A
    plain ValueError is a defect of ours.
    """
    if isinstance(error, JaxserveError):
        return True
    package = type(error).__module__.partition(".")[0]
    if isinstance(error, ValueError) and package in jaxserve.SIBLING_PACKAGES:
        return True
    return isinstance(error, OSError) and _comes_from_model_files(error)


def _comes_from_model_files(error: OSError) -> bool:
    """Whether it was raised while a model was looked up or read: these modules
    touch no other files. An OSError from anywhere else is a defect of ours."""
    names = (
        frame.f_globals.get("__name__", "") for frame, _ in traceback.walk_tb(error.__traceback__)
    )
    return any(
        name.partition(".")[0] in jaxserve.SIBLING_PACKAGES or name == "jaxserve.model_store"
        for name in names
    )


def user_message(error: Exception) -> str:
    """What to print of an error for which `is_user_error` holds."""
    if isinstance(error, OSError) and error.strerror:
        where = error.filename or "a file of the model"
        return f"{where} cannot be read: {error.strerror} (--model)"
    return str(error)


def main() -> None:
    """Runs the command line. A user's mistake is one red line and exit code 2."""
    # gRPC's core reads it when it is imported. Its log holds bytes that peers send, line ends too,
    # so that anybody could forge lines of a server's log; Python has what goes wrong as errors.
    os.environ["GRPC_VERBOSITY"] = "NONE"
    command = typer.main.get_command(app)
    try:
        command(prog_name="jaxserve")
    except Exception as error:
        if not is_user_error(error):
            raise
        typer.secho(f"error: {user_message(error)}", fg=typer.colors.RED, err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
