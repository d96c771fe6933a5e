"""`jaxserve doctor`: what this machine can do and what is missing."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from jaxserve.doctor import Finding, Status, examine

app = typer.Typer(add_completion=False)

_COLORS = {
    Status.OK: typer.colors.GREEN,
    Status.NOTE: typer.colors.YELLOW,
    Status.BROKEN: typer.colors.RED,
}


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")] = False,
) -> None:
    """Tell what this machine can do and what is missing.

    Looks at Python, packages, processor, memory, devices, caches, the default
    model and ports, and changes nothing. Each problem comes with its fix. The
    exit code is 1 if something that is needed is broken, else 0.
    """
    findings = examine()
    is_healthy = all(finding.status is not Status.BROKEN for finding in findings)
    if as_json:
        report = {"healthy": is_healthy, "findings": [asdict(finding) for finding in findings]}
        typer.echo(json.dumps(report, indent=2))
    else:
        _print(findings)
    raise typer.Exit(0 if is_healthy else 1)


def _print(findings: list[Finding]) -> None:
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        status = typer.style(f"{finding.status:>6}", fg=_COLORS[finding.status])
        typer.echo(f"{status}  {finding.name:<{width}}  {finding.value}")
        if finding.fix:
            typer.echo(f"{'':>8}{'':<{width}}  fix: {finding.fix}")
    broken = sum(finding.status is Status.BROKEN for finding in findings)
    typer.echo()
    if broken:
        typer.echo(f"{broken} broken: mend what is marked so and run this again.")
    else:
        typer.echo("Ready: `jaxserve chat` talks to the default model.")
