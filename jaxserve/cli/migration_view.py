"""How `jaxserve checkpoint` looks on a terminal."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from checkpoint.migrate.run import OnProgress
    from jaxserve.migration.convert import Conversion
    from jaxserve.migration.diff import ModelDifference
    from jaxserve.migration.verify import Verification

MAX_SHOWN = 40


@contextlib.contextmanager
def progress_bar(conversion: Conversion, *, quiet: bool) -> Iterator[OnProgress]:
    """A bar on standard error with rate and time to go, over the target's bytes."""
    # Imported late: it loads jax.
    from checkpoint.migrate.run import OnProgress

    if quiet:
        yield OnProgress()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("plan", total=conversion.migration.plan.num_bytes)
        yield OnProgress(
            window=lambda num_bytes, _written: bar.advance(task, num_bytes),
            phase=lambda name: bar.update(task, description=name),
        )


def print_plan(plan: Mapping[str, Any], *, as_json: bool) -> None:
    """What `--dry-run` shows."""
    if as_json:
        typer.echo(json.dumps(plan, indent=2))
        return
    for array in plan["arrays"]:
        shape = " x ".join(str(size) for size in array["shape"]) or "scalar"
        steps = "; ".join(array["transforms"]) or "as it is"
        first, *rest = array["from"]
        origin = first if not rest else f"{first} and {len(rest)} more"
        typer.echo(f"{array['name']}  {array['dtype']}  {shape}\n    from {origin}: {steps}")
    for note in plan["notes"]:
        typer.echo(f"note: {note}")
    typer.echo(
        f"{plan['num_arrays']} arrays, {plan['num_bytes'] / 1e6:.1f} MB, in windows of at most "
        f"{plan['window_bytes'] / 1e6:.1f} MB; peak memory {plan['peak_memory_bytes'] / 1e6:.0f} MB"
    )
    typer.echo(f"no weights were read, nothing was written; target: {plan['target']}")


def print_difference(difference: ModelDifference, *, as_json: bool) -> None:
    """What `diff` shows."""
    if as_json:
        typer.echo(json.dumps(difference.to_json(), indent=2))
        return
    for name, (first, second) in difference.config.items():
        typer.echo(f"config {name}: {first!r} and {second!r}")
    for array in difference.arrays[:MAX_SHOWN]:
        line = f"{array.name}: {array.what}"
        if array.first_index is not None and array.first_values is not None:
            ulp = "" if array.max_ulp is None else f", {array.max_ulp} ulp"
            line += (
                f": {array.num_differing} differ, by up to {array.max_abs:.6g}{ulp}; first at "
                f"{list(array.first_index)}: {' and '.join(array.first_values)}"
            )
        typer.echo(line)
    hidden = len(difference.arrays) - MAX_SHOWN
    if hidden > 0:
        typer.echo(f"... and {hidden} more arrays differ")
    typer.echo(f"{difference.num_equal} arrays are equal, {len(difference.arrays)} differ")


def print_verification(result: Verification, *, as_json: bool) -> None:
    """What `verify` shows."""
    if as_json:
        report = {
            "verdict": result.verdict,
            "problems": list(result.problems),
            "warnings": list(result.warnings),
            "checked": result.checked,
        }
        typer.echo(json.dumps(report, indent=2))
        return
    for problem in result.problems:
        typer.secho(f"problem: {problem}", fg=typer.colors.RED)
    for warning in result.warnings:
        typer.secho(f"warning: {warning}", fg=typer.colors.YELLOW)
    end = "; no manifest vouches for the values" if result.verdict == "sound" else ""
    typer.echo(f"{result.verdict}: checked {result.checked}{end}")
