"""`jaxserve bench`: throughput and latency on this machine."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from jaxserve.cli import bench_quality, bench_serve
from jaxserve.cli.engine_options import with_engine_options
from jaxserve.cli.local_engine import local_engine
from jaxserve.engine.config import EngineConfig
from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.engine.load_run import LoadRun
    from jaxserve.engine.request import GenerationRequest
    from jaxserve.engine.startup import RunningEngine

app = typer.Typer(add_completion=False, no_args_is_help=True)

_NUM_WARM_UP_REQUESTS = 2
_LOAD = "Load"

NumRequests = Annotated[int, typer.Option(min=1, help="Requests to run.", rich_help_panel=_LOAD)]
InputLen = Annotated[
    int, typer.Option(min=1, help="Tokens of each random prompt.", rich_help_panel=_LOAD)
]
OutputLen = Annotated[
    int,
    typer.Option(
        min=1, help="Tokens generated for each, whatever they are.", rich_help_panel=_LOAD
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(
        help="JSON lines as for `jaxserve generate --input`, used in turn in place of random "
        "prompts.",
        metavar="FILE",
        rich_help_panel=_LOAD,
    ),
]
Seed = Annotated[int, typer.Option(min=0, help="Of the random prompts.", rich_help_panel=_LOAD)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.callback()
def bench() -> None:
    """Measure throughput and latency: of the engine alone, or through a server."""


app.command()(bench_serve.serve)
app.command()(bench_quality.quality)


@app.command()
@with_engine_options
def throughput(
    engine_config: EngineConfig,
    num_requests: NumRequests = 64,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    concurrency: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Requests in the engine at a time.",
            show_default="--max-num-seqs",
            rich_help_panel=_LOAD,
        ),
    ] = None,
    prompts: Prompts = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Tokens per second with many requests at a time.

    Example: jaxserve bench throughput --num-requests 64 --concurrency 32 --json
    """
    _bench(
        "throughput",
        engine_config,
        num_requests=num_requests,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        prompts=prompts,
        seed=seed,
        as_json=as_json,
    )


@app.command()
@with_engine_options
def latency(
    engine_config: EngineConfig,
    num_requests: NumRequests = 8,
    input_len: InputLen = 128,
    output_len: OutputLen = 64,
    concurrency: Annotated[
        int,
        typer.Option(min=1, help="Requests in the engine at a time.", rich_help_panel=_LOAD),
    ] = 1,
    prompts: Prompts = None,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Time to the first token and between tokens, one request after another.

    Example: jaxserve bench latency --input-len 512 --output-len 32
    """
    _bench(
        "latency",
        engine_config,
        num_requests=num_requests,
        input_len=input_len,
        output_len=output_len,
        concurrency=concurrency,
        prompts=prompts,
        seed=seed,
        as_json=as_json,
    )


def _bench(
    name: str,
    engine_config: EngineConfig,
    *,
    num_requests: int,
    input_len: int,
    output_len: int,
    concurrency: int | None,
    prompts: Path | None,
    seed: int,
    as_json: bool,
) -> None:
    with local_engine(engine_config) as running:
        concurrency = concurrency or running.report.settings.num_seqs
        prompt_ids = (
            _random_prompts(running, num_requests + _NUM_WARM_UP_REQUESTS, input_len, seed)
            if prompts is None
            else _given_prompts(running, prompts)
        )
        result = _measure(running, prompt_ids, num_requests, output_len, concurrency)
        summary: dict[str, Any] = {
            "benchmark": name,
            "load": {
                "concurrency": concurrency,
                "input_len": input_len if prompts is None else None,
                "output_len": output_len,
                "seed": seed,
            },
            "machine": _machine(running),
            **result.summary(),
        }
    if as_json:
        typer.echo(json.dumps(summary))
    else:
        _print_table(summary)
    if summary["num_failed"]:
        typer.secho(f"error: {summary['num_failed']} requests failed", fg="red", err=True)
        raise typer.Exit(1)


def _measure(
    running: RunningEngine,
    prompt_ids: list[tuple[int, ...]],
    num_requests: int,
    output_len: int,
    concurrency: int,
) -> LoadRun:
    from jaxserve.engine.load_run import run_load

    longest = max(len(ids) for ids in prompt_ids)
    if longest + output_len > running.engine.max_model_len:
        raise ConfigError(
            f"a prompt of {longest} tokens and --output-len {output_len} do not fit "
            f"--max-model-len {running.engine.max_model_len}: lower one or raise the other"
        )
    requests = [
        _request(f"bench-{index}", prompt_ids[index % len(prompt_ids)], output_len)
        for index in range(num_requests)
    ]
    warm_up = [
        _request(f"warm-up-{index}", prompt_ids[-1 - index % len(prompt_ids)], min(output_len, 4))
        for index in range(_NUM_WARM_UP_REQUESTS)
    ]
    run_load(running.engine, warm_up, concurrency=concurrency)
    console = Console(stderr=True)
    columns = (TextColumn("Measuring"), BarColumn(), MofNCompleteColumn())
    # One refresh a second: the terminal must not take the engine's time.
    with Progress(
        *columns, console=console, refresh_per_second=1, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=num_requests)
        return run_load(
            running.engine,
            requests,
            concurrency=concurrency,
            on_finished=lambda: bar.advance(task),
        )


def _request(request_id: str, token_ids: tuple[int, ...], output_len: int) -> GenerationRequest:
    from jaxserve.engine.request import GenerationRequest
    from jaxserve.engine.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=output_len, ignore_eos=True)
    return GenerationRequest(request_id, token_ids, sampling)


def _random_prompts(
    running: RunningEngine, count: int, length: int, seed: int
) -> list[tuple[int, ...]]:
    import numpy as np

    vocab_size = running.report.settings.model_config.vocab_size
    rng = np.random.default_rng(seed)
    return [tuple(row) for row in rng.integers(0, vocab_size, (count, length)).tolist()]


def _given_prompts(running: RunningEngine, path: Path) -> list[tuple[int, ...]]:
    from jaxserve.engine.prompt_record import BadRecord, read_records

    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--prompts {path} cannot be read: {error}") from error
    records = list(
        read_records(lines, running.tokenizer, running.engine.validate, sampling_defaults={})
    )
    for record in records:
        if isinstance(record, BadRecord):
            raise ConfigError(f"--prompts {path}, line {record.line_number}: {record.error}")
    if not records:
        raise ConfigError(f"--prompts {path} holds no prompt")
    return [r.request.prompt_token_ids for r in records if not isinstance(r, BadRecord)]


def _machine(running: RunningEngine) -> dict[str, Any]:
    import jax

    report = running.report
    settings, scheduler = report.settings, report.settings.scheduler
    return {
        "device": report.device,
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "model": report.model_name,
        "dtype": str(settings.dtype),
        "buckets": list(scheduler.buckets),
        "token_budget": scheduler.token_budget,
        "max_num_seqs": scheduler.max_num_seqs,
        "max_model_len": scheduler.max_model_len,
        "num_pages": scheduler.num_pages,
        "policy": scheduler.policy,
        "jax": jax.__version__,
        "ready_s": report.ready_s,
    }


def _cpu_name() -> str:
    """As Linux tells it; elsewhere the architecture."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _print_table(summary: dict[str, Any]) -> None:
    machine, load = summary["machine"], summary["load"]
    table = Table(
        title=f"{summary['benchmark']}: {machine['model']}, {machine['dtype']}, "
        f"{machine['device']}, {machine['num_cores']} cores, buckets "
        f"{', '.join(map(str, machine['buckets']))}",
        title_justify="left",
    )
    table.add_column("")
    for column in ("mean", "P50", "P90", "P99"):
        table.add_column(column, justify="right")
    for key, label in (
        ("ttft_ms", "time to first token, ms"),
        ("tpot_ms", "time per output token, ms"),
        ("itl_ms", "between tokens, ms"),
        ("e2e_ms", "whole request, ms"),
        ("step_ms", "step, ms"),
        ("host_gap_ms", "host gap before a step, ms"),
        ("host_gap_fraction", "host gap / step"),
    ):
        values = summary[key]
        cells = [f"{values[p]:.4g}" for p in ("mean", "p50", "p90", "p99")] if values else ["-"] * 4
        table.add_row(label, *cells)
    console = Console()
    console.print(table)
    console.print(
        f"{summary['output_tokens_per_s']:.1f} output tokens/s, "
        f"{summary['total_tokens_per_s']:.1f} with prompts, "
        f"{summary['num_requests']} requests, {load['concurrency']} at a time, in "
        f"{summary['elapsed_s']:.1f} s"
    )
    console.print(
        f"{summary['num_steps']} steps, mean fill {summary['mean_step_fill']:.0%}, "
        f"{summary['steps_ready_at_once_fraction']:.0%} ready before the host asked, "
        f"{summary['num_preemptions']} preemptions, "
        f"{summary['compiles_after_ready']} compiles after READY"
    )
