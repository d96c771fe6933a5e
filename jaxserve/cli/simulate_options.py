"""Options that the sub-commands of `simulate` share, and what is made of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jaxserve.errors import ConfigError

if TYPE_CHECKING:
    from jaxserve.simulator.experiment import Experiment, Workload

_SETUP, _LOAD = "Set-up", "Load"

Scenario = Annotated[
    str, typer.Option(help="MODEL-chat or MODEL-arxiv, as published.", rich_help_panel=_SETUP)
]
Slo = Annotated[
    str,
    typer.Option(
        help="strict or relaxed (the published P99 time between tokens), or milliseconds.",
        rich_help_panel=_SETUP,
    ),
]
TokenBudget = Annotated[
    int | None,
    typer.Option(
        min=1, help="Rows of a step (tau).", show_default="published", rich_help_panel=_SETUP
    ),
]
StepTimeMs = Annotated[
    float | None,
    typer.Option(
        min=0.1,
        help="Fill steps up to this predicted time instead; --token-budget is then the most rows.",
        rich_help_panel=_SETUP,
    ),
]
MaxNumSeqs = Annotated[
    int | None,
    typer.Option(
        min=1, help="Requests at a time.", show_default="published", rich_help_panel=_SETUP
    ),
]
Buckets = Annotated[
    str,
    typer.Option(
        help="Row counts of compiled steps, e.g. 128,512: a step then costs its bucket's rows.",
        show_default="exact rows",
        rich_help_panel=_SETUP,
    ),
]
StreamChunks = Annotated[
    bool,
    typer.Option(
        help="With pipeline stages, a prompt's next chunk follows at once.", rich_help_panel=_SETUP
    ),
]
CostModelName = Annotated[
    str, typer.Option("--cost-model", help="fitted, table or roofline.", rich_help_panel=_SETUP)
]
Profile = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER", help="Profile CSVs, for --cost-model table.", rich_help_panel=_SETUP
    ),
]
HostMs = Annotated[
    float, typer.Option(min=0, help="Host time of each step.", rich_help_panel=_SETUP)
]
HostMsPerSeq = Annotated[
    float,
    typer.Option(min=0, help="Host time of each sequence in a step.", rich_help_panel=_SETUP),
]
WorkloadName = Annotated[
    str | None,
    typer.Option(
        "--workload",
        help="sharegpt, arxiv, azure_conv or azure_code.",
        show_default="the scenario's",
        rich_help_panel=_LOAD,
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(metavar="CSV", help="Requests of a file instead.", rich_help_panel=_LOAD),
]
Arrivals = Annotated[str, typer.Option(help="poisson, gamma or replay.", rich_help_panel=_LOAD)]
Burstiness = Annotated[
    float, typer.Option(help="Of gamma gaps; 1 is Poisson.", rich_help_panel=_LOAD)
]
ClipGaps = Annotated[
    float | None,
    typer.Option(
        help="Cut Poisson gaps at so many means, to replicate others' generators.",
        rich_help_panel=_LOAD,
    ),
]
NumRequests = Annotated[int, typer.Option(min=1, help="In each run.", rich_help_panel=_LOAD)]
Seed = Annotated[int, typer.Option(min=0, rich_help_panel=_LOAD)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Plot = Annotated[Path | None, typer.Option(metavar="PNG", help="Write a chart.")]


def make_experiment(
    scenario: str,
    slo: str,
    token_budget: int | None,
    step_time_ms: float | None,
    max_num_seqs: int | None,
    buckets: str,
    stream_chunks: bool,
    cost_model: str,
    profile: Path | None,
    host_ms: float,
    host_ms_per_seq: float,
) -> Experiment:
    from jaxserve.simulator.cost_models.base import HostCost
    from jaxserve.simulator.experiment import Experiment, make_cost_model
    from jaxserve.simulator.scenarios import find_scenario

    found = find_scenario(scenario)
    rows = tuple(int(number) for number in numbers_of("--buckets", buckets)) if buckets else ()
    host = HostCost(host_ms / 1e3, host_ms_per_seq / 1e3)
    predict = make_cost_model(
        cost_model, found.deployment, host, profile=profile, bucketed=bool(rows)
    )
    return Experiment(
        deployment=found.deployment,
        cost=predict,
        max_model_len=found.max_model_len,
        token_budget=token_budget or found.token_budget(slo),
        max_num_seqs=max_num_seqs,
        buckets=rows,
        stream_chunks=stream_chunks,
        step_time_s=None if step_time_ms is None else step_time_ms / 1e3,
    )


def make_requests(
    scenario: str,
    workload: str | None,
    trace: Path | None,
    arrivals: str,
    burstiness: float,
    clip_gaps: float | None,
    num_requests: int,
    seed: int,
) -> Workload:
    from jaxserve.simulator.arrivals import ArrivalProcess
    from jaxserve.simulator.experiment import make_workload
    from jaxserve.simulator.scenarios import find_scenario

    found = find_scenario(scenario)
    return make_workload(
        workload or found.workload,
        num_requests,
        seed,
        max_model_len=found.max_model_len,
        arrivals=ArrivalProcess(arrivals, burstiness, clip_gaps),
        trace=trace,
    )


def names_of(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def numbers_of(option: str, text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 0:
        raise ConfigError(f"{option} takes numbers like 1,2.5, not {text!r}")
    return numbers


def print_result(values: Mapping[str, object], as_json: bool, table: Table) -> None:
    if as_json:
        typer.echo(json.dumps(values))
    else:
        Console().print(table)
