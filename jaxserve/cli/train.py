"""`jaxserve train`: runs that can be stopped, killed, moved and resized."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

RUN = "run"


class DefaultCommandGroup(TyperGroup):
    """Takes a config's path where a sub-command could stand."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """`train CONFIG ...` is `train run CONFIG ...`."""
        if args and args[0] not in self.commands and args[0] not in ("--help", "-h"):
            args = [RUN, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=DefaultCommandGroup,
    add_completion=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run's folder (its run_dir).")]


@app.callback()
def train() -> None:
    """Train a model; the same command resumes a run, with the same bits.

    \b
    jaxserve train CONFIG.toml                start or resume (short for `train run CONFIG.toml`)
    jaxserve train CONFIG.toml --dry-run      the plan: sizes, memory, who computes what
    jaxserve train status RUN                 how far it is, what happened, where the time went
    jaxserve train resize RUN --processes 4   go on with other processes, without losing a step
    jaxserve train stop RUN                   stop it after the steps under way

    Exit codes of a run: 0 finished, 75 stopped and to be resumed, 2 something to mend.
    """


@app.command(RUN)
def run(
    config_path: Annotated[Path, typer.Argument(metavar="CONFIG.toml")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="A.B=C", help="Changes a field of the config; repeatable."),
    ] = None,
    devices: Annotated[
        int | None, typer.Option(help="One process with so many devices (virtual ones on a CPU).")
    ] = None,
    processes: Annotated[
        int | None, typer.Option(help="So many processes with one device each.")
    ] = None,
    lr_schedule: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Another schedule with the same peak: knee, cosine, auto …"
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan; start nothing.")
    ] = False,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print every field as TOML; start nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Set an existing run aside (renamed) and start anew.")
    ] = False,
    allow_restart_from_scratch: Annotated[
        bool,
        typer.Option(
            "--allow-restart-from-scratch", help="Begin anew if no checkpoint of the run is whole."
        ),
    ] = False,
    allow_numerics_change: Annotated[
        bool,
        typer.Option(
            "--allow-numerics-change",
            help="Go on with another jax, XLA flags or hardware, although bits may change.",
        ),
    ] = False,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Fence another process that trains this run but hangs."),
    ] = False,
) -> None:
    """Start a run, or resume it.

    Example: jaxserve train examples/train/tiny.toml --processes 2
    """
    from jaxserve.trainer.config_file import dump_toml

    config = _load(config_path, settings or [], devices, processes, lr_schedule)
    if print_config:
        typer.echo(dump_toml(config), nl=False)
        return
    if dry_run:
        from jaxserve.trainer.dry_run import plan_of, plan_text

        typer.echo(plan_text(plan_of(config)))
        return
    from jaxserve.trainer.run_start import StartOptions, train
    from jaxserve.trainer.view import TerminalView

    flops_per_token = None
    if config.logging.peak_flops is not None:
        from jaxserve.trainer.dry_run import plan_of

        flops_per_token = plan_of(config)["flops_per_token"]
    options = StartOptions(
        restart_from_scratch=allow_restart_from_scratch,
        numerics_change=allow_numerics_change,
        take_over=take_over,
        force=force,
    )
    with TerminalView(config.total_steps, flops_per_token, config.logging.peak_flops) as view:
        code = train(config, options, view)
    raise typer.Exit(code)


@app.command()
def status(
    run_dir: RunArgument,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How far a run is, what happened to it, and where its time went."""
    from jaxserve.trainer.run_folder import RunFolder
    from jaxserve.trainer.run_status import status_of

    found = status_of(RunFolder(run_dir.absolute()))
    if as_json:
        typer.echo(json.dumps(found))
        return
    for name, value in found.items():
        shown = value
        if isinstance(value, dict):
            shown = ", ".join(f"{key} {one}" for key, one in value.items() if one) or "none"
        typer.echo(f"{name:14} {shown}")


@app.command()
def resize(
    run_dir: RunArgument,
    processes: Annotated[int, typer.Option(help="Processes that are to go on.")],
    devices: Annotated[int, typer.Option(help="Devices of each.")] = 1,
) -> None:
    """Have a running run go on with other processes; no step is lost and no bit changes."""
    _ask(run_dir, {"kind": "resize", "processes": processes, "devices_per_process": devices})


@app.command()
def stop(run_dir: RunArgument) -> None:
    """Stop a running run after the steps under way; the same command resumes it later."""
    _ask(run_dir, {"kind": "stop"})


def _ask(run_dir: Path, request: dict[str, Any]) -> None:
    from jaxserve.trainer.errors import RunError
    from jaxserve.trainer.run_folder import RunFolder
    from jaxserve.trainer.run_status import is_trained_now

    folder = RunFolder(run_dir.absolute())
    folder.require()
    if not is_trained_now(folder):
        raise RunError(f"nobody trains {folder.root} now: there is nothing to {request['kind']}")
    folder.ask(request)
    typer.echo(f"asked {folder.root} to {request['kind']}")


def _load(
    path: Path,
    settings: list[str],
    devices: int | None,
    processes: int | None,
    lr_schedule: str | None,
) -> Any:
    from jaxserve.trainer.config import config_from_table
    from jaxserve.trainer.config_file import read_toml, with_settings
    from jaxserve.trainer.errors import TrainConfigError
    from jaxserve.trainer.schedule_section import with_kind

    if devices is not None and processes is not None:
        raise TrainConfigError(
            "--devices and --processes exclude each other; for both, use --set "
            "placement.processes=... --set placement.devices_per_process=..."
        )
    table = with_settings(read_toml(path), settings)
    if devices is not None or processes is not None:
        placement = table.setdefault("placement", {})
        placement["processes"] = processes or 1
        placement["devices_per_process"] = devices or 1
    if lr_schedule is not None:
        table["schedule"] = with_kind(table.get("schedule", {}), lr_schedule)
    return config_from_table(table, path)
