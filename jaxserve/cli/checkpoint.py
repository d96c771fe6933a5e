"""`jaxserve checkpoint`: convert, reshard, verify, inspect, diff and list models; adapters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from checkpoint.migrate.read_back import ReadBack
from jaxserve.cli.migration_view import (
    print_difference,
    print_plan,
    print_verification,
    progress_bar,
)
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from checkpoint.migrate.run import Limits
    from jaxserve.migration.convert import Conversion

EXIT_CODES = (
    "Exit codes: 0 done; 1 the check says no (damaged, different, logits apart); 2 refused, "
    "nothing was changed; 3 verify: sound, but no manifest vouches for the values; 4 reading or "
    "writing failed, run it again to go on."
)
app = typer.Typer(add_completion=False, no_args_is_help=True, epilog=EXIT_CODES)

MAX_WORKERS = 64
READ_BACK_SAYS = {
    ReadBack.FULL: "all of it read back and equal",
    ReadBack.ENDS: "the ends of each window read back and equal",
    ReadBack.NONE: "not read back",
}


@app.callback()
def checkpoint() -> None:
    """Convert, reshard, verify, inspect, diff and list models in any format."""


class ExitCode(IntEnum):
    """Stable: scripts rely on them."""

    OK = 0
    NO = 1
    REFUSED = 2
    UNVOUCHED = 3
    FAILED = 4


Source = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A .gguf file, a Hugging Face folder, a model folder or training run (DIR or "
        "DIR@STEP), or a catalogue name.",
    ),
]
Target = Annotated[Path, typer.Argument(metavar="DST", help="What will be made.")]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object, for programs.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is at DST.")]
Restart = Annotated[
    bool, typer.Option("--restart", help="Throw away what an interrupted run has made.")
]
ReadBackPart = Annotated[
    ReadBack,
    typer.Option(
        "--read-back",
        help="What is read again from the disk, and compared, of each window that was written: all "
        "of it, its first and last MiB, or nothing.",
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan; read no weights.")]
MemoryBudget = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="BYTES",
        help="Most memory of the whole process, e.g. 700MB. Without it windows are 64 MiB.",
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--num-workers", min=1, max=MAX_WORKERS, help="Threads that read; by default the cores."
    ),
]


@app.command(epilog=EXIT_CODES)
def convert(
    source: Source,
    target: Target,
    to: Annotated[
        str, typer.Option("--to", metavar="FORMAT", help="safetensors, gguf, or orbax (ours).")
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization", metavar="TYPE", help="Of a GGUF: F32, F16, BF16, Q8_0, Q4_0, ..."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", help="float32, bfloat16 or float16; by default as in SRC."),
    ] = None,
    layers: Annotated[
        str, typer.Option("--layers", help="With orbax: scanned (stacked) or unscanned.")
    ] = "scanned",
    lora: Annotated[
        Path | None,
        typer.Option("--lora", metavar="DIR", help="A PEFT adapter; needs --merge."),
    ] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Add the adapter to the weights.")] = False,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="DIR",
            help="Config and tokenizer of a checkpoint that Orbax wrote by itself: a folder with "
            "config.json or model.json.",
        ),
    ] = None,
    verify: Annotated[
        str | None,
        typer.Option(
            "--verify",
            metavar="logits",
            help="Compare last-token logits with SRC's before "
            "publishing; holds both models in memory.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option("--prompts", help="Prompts for --verify, one a line; else built-in ones."),
    ] = None,
    max_kl: Annotated[
        float, typer.Option("--max-kl", min=0.0, help="Most divergence --verify allows, in nats.")
    ] = 1e-3,
    max_shard_bytes: Annotated[
        str, typer.Option("--max-shard-bytes", help="Of one safetensors file.")
    ] = "5GB",
    memory_budget: MemoryBudget = None,
    num_workers: Workers = None,
    read_back: ReadBackPart = ReadBack.ENDS,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    force: Force = False,
    restart: Restart = False,
) -> None:
    """Convert a model to another format.

    Planned, streamed in bounded windows, and published in one rename. What is
    killed goes on where it was when the same command is run again.

    Examples: jaxserve checkpoint convert model.gguf folder --to safetensors,
    jaxserve checkpoint convert folder small.gguf --to gguf --quantization Q8_0
    """
    import jax

    from jaxserve.migration.convert import plan_conversion
    from jaxserve.migration.logits import LogitsCheck
    from jaxserve.migration.request import ConversionRequest

    if (lora is not None) != merge:
        raise ConfigError("--lora DIR and --merge go together: a merged adapter is what is written")
    if verify not in (None, "logits"):
        raise ConfigError(f"--verify {verify!r} is not known; use --verify logits")
    request = ConversionRequest(
        target=target,
        to=to,
        dtype=dtype,
        quantization=quantization.upper() if quantization else None,
        layers=layers,
        max_shard_bytes=_bytes("--max-shard-bytes", max_shard_bytes),
        lora=lora,
        config=config,
    )
    limits = _limits(memory_budget, num_workers, read_back, force=force, restart=restart)
    check = None
    if verify is None:
        jax.config.update("jax_platforms", "cpu")  # A server may have all of an accelerator.
    else:
        check = LogitsCheck.from_options(prompts, max_kl, lora)
    with (
        _exit_codes(),
        plan_conversion(
            _resolve(source),
            request,
            num_workers=limits.num_workers,
            memory_bytes=limits.memory_bytes,
            check=check,
        ) as conversion,
    ):
        _run(conversion, limits, dry_run=dry_run, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def reshard(
    source: Source,
    target: Target,
    layers: Annotated[
        str, typer.Option("--layers", help="scanned (stacked) or unscanned (one array a layer).")
    ] = "scanned",
    memory_budget: MemoryBudget = None,
    num_workers: Workers = None,
    read_back: ReadBackPart = ReadBack.ENDS,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    force: Force = False,
    restart: Restart = False,
) -> None:
    """Write a checkpoint anew with all it holds, optimizer state too, in another layout.

    A stored checkpoint holds whole arrays and loads onto any mesh as it is; this changes how
    layers are stored.

    Example: jaxserve checkpoint reshard runs/tiny@1000 runs/tiny-layers --layers unscanned
    """
    from jaxserve.migration.convert import plan_reshard

    limits = _limits(memory_budget, num_workers, read_back, force=force, restart=restart)
    with (
        _exit_codes(),
        plan_reshard(
            _resolve(source),
            target,
            layers=layers,
            num_workers=limits.num_workers,
            memory_bytes=limits.memory_bytes,
        ) as conversion,
    ):
        _run(conversion, limits, dry_run=dry_run, as_json=as_json)


@app.command(epilog=EXIT_CODES)
def export_adapter(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A training run with [lora] (DIR or DIR@STEP).")
    ],
    target: Target,
    force: Force = False,
) -> None:
    """Write a training run's adapters in PEFT's format, without the model they belong to.

    Example: jaxserve checkpoint export-adapter runs/smollm2-lora adapter
    """
    from jaxserve.migration.lora import export_adapter as export

    with _exit_codes():
        export(_resolve(run), target, overwrite=force)
    typer.echo(f"{target}: the adapters in PEFT's format")


@app.command(epilog=EXIT_CODES)
def verify(source: Source, as_json: AsJson = False) -> None:
    """Check a model: digests where there are some, else the structure. Changes nothing."""
    from jaxserve.migration.verify import Verdict, verify_model

    with _exit_codes():
        result = verify_model(_resolve(source, must_exist=False))
    print_verification(result, as_json=as_json)
    codes = {
        Verdict.VERIFIED: ExitCode.OK,
        Verdict.SOUND: ExitCode.UNVOUCHED,
        Verdict.DAMAGED: ExitCode.NO,
    }
    raise typer.Exit(codes[result.verdict])


@app.command(epilog=EXIT_CODES)
def inspect(source: Source, as_json: AsJson = False) -> None:
    """Show a model's config, arrays and where it came from, without reading weights."""
    from jaxserve.migration.inspect import inspect_model

    with _exit_codes():
        report = inspect_model(_resolve(source))
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    arrays = report.pop("arrays")
    for name, value in report.items():
        typer.echo(f"{name}: {json.dumps(value)}")
    for array in arrays:
        shape = " x ".join(str(size) for size in array["shape"]) or "scalar"
        typer.echo(f"  {array['name']}  {array['dtype']}  {shape}")


@app.command(epilog=EXIT_CODES)
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A model, as SRC of convert.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another one, in any format.")],
    as_json: AsJson = False,
) -> None:
    """Compare two models, array by array; exit code 1 if they differ."""
    from jaxserve.migration.diff import diff_models

    with _exit_codes():
        difference = diff_models(_resolve(first), _resolve(second))
    print_difference(difference, as_json=as_json)
    raise typer.Exit(ExitCode.OK if difference.is_equal else ExitCode.NO)


@app.command(name="list", epilog=EXIT_CODES)
def list_(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder or a run.")],
    as_json: AsJson = False,
) -> None:
    """List the checkpoints of a model folder; each can be named as DIR@STEP."""
    from jaxserve.migration.inspect import list_steps

    with _exit_codes():
        steps = list_steps(folder)
    if as_json:
        typer.echo(json.dumps(steps, indent=2))
        return
    for step in steps:
        size = "" if step["num_bytes"] is None else f"  {step['num_bytes'] / 1e6:.1f} MB"
        typer.echo(f"{step['name']}  {step['state']}{size}  {json.dumps(step['metadata'])}")


def _run(conversion: Conversion, limits: Limits, *, dry_run: bool, as_json: bool) -> None:
    from jaxserve.migration.convert import describe

    if dry_run:
        print_plan(describe(conversion), as_json=as_json)
        return
    with progress_bar(conversion, quiet=as_json) as progress:
        manifest = conversion.run(limits, progress)
    report = {
        "target": str(conversion.migration.target),
        "num_arrays": len(manifest.arrays),
        "num_bytes": conversion.migration.plan.num_bytes,
        "plan_sha256": manifest.plan_sha256,
        "read_back": limits.read_back.value,
        "files": {name: blake3 for name, (_, blake3) in manifest.files.items()},
        "notes": list(conversion.migration.plan.notes),
    }
    if as_json:
        typer.echo(json.dumps(report, indent=2))
        return
    for note in conversion.migration.plan.notes:
        typer.echo(f"note: {note}")
    says = READ_BACK_SAYS[limits.read_back]
    typer.echo(f"{report['target']}: {len(manifest.arrays)} arrays, {says}")


@contextlib.contextmanager
def _exit_codes() -> Iterator[None]:
    """Failures that a second try may mend, and a check's no, have their own codes."""
    from checkpoint.migrate.errors import WriteFailed
    from checkpoint.store import StoreUnreadable
    from jaxserve.migration.logits import LogitsApart

    try:
        yield
    except (WriteFailed, StoreUnreadable) as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(ExitCode.FAILED) from None
    except LogitsApart as error:
        typer.secho(f"error: {error}", fg=typer.colors.RED, err=True)
        raise typer.Exit(ExitCode.NO) from None


def _resolve(name: str, *, must_exist: bool = True) -> Path:
    from jaxserve import model_store

    try:
        return model_store.resolve(name)
    except ConfigError:
        if must_exist:
            raise ConfigError(
                f"{name} is neither a path that exists nor a name that `jaxserve models` lists"
            ) from None
        return Path(name)


def _limits(
    memory_budget: str | None,
    num_workers: int | None,
    read_back: ReadBack,
    *,
    force: bool,
    restart: bool,
) -> Limits:
    import os

    from checkpoint.migrate.run import Limits

    budget = None if memory_budget is None else _bytes("--memory-budget", memory_budget)
    workers = num_workers or len(os.sched_getaffinity(0))
    return Limits(workers, budget, force=force, restart=restart, read_back=read_back)


def _bytes(option: str, text: str) -> int:
    from jaxserve.cli.engine_options import parse_byte_size

    try:
        return parse_byte_size(text)
    except typer.BadParameter as error:
        raise ConfigError(f"{option}: {error}") from None
