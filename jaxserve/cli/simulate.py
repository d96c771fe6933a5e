"""`jaxserve simulate`: the engine's own scheduler and loop in virtual time."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.table import Table

from jaxserve.cli.simulate_options import (
    Arrivals,
    AsJson,
    Buckets,
    Burstiness,
    ClipGaps,
    CostModelName,
    HostMs,
    HostMsPerSeq,
    MaxNumSeqs,
    NumRequests,
    Plot,
    Profile,
    Scenario,
    Seed,
    Slo,
    StepTimeMs,
    StreamChunks,
    TokenBudget,
    Trace,
    WorkloadName,
    make_experiment,
    make_requests,
    names_of,
    numbers_of,
    print_result,
)
from jaxserve.cli.simulate_steps import cost, fit, piggyback

app = typer.Typer(add_completion=False, no_args_is_help=True)


@app.callback()
def simulate() -> None:
    """Try schedulers on published models and workloads, in virtual time.

    The scheduler and the engine's loop are the ones that serve; only the device
    is a cost model (A100-80GB) and the clock is virtual.
    """


@app.command()
def run(
    scenario: Scenario = "yi-34b-chat",
    slo: Slo = "strict",
    policies: Annotated[str, typer.Option(help="One or more, comma-separated.")] = "sarathi",
    qps: Annotated[str, typer.Option(help="Requests per second; one or more rates.")] = "0.5",
    num_requests: NumRequests = 300,
    seed: Seed = 1,
    token_budget: TokenBudget = None,
    step_time_ms: StepTimeMs = None,
    max_num_seqs: MaxNumSeqs = None,
    buckets: Buckets = "",
    stream_chunks: StreamChunks = False,
    cost_model: CostModelName = "fitted",
    profile: Profile = None,
    host_ms: HostMs = 5.0,
    host_ms_per_seq: HostMsPerSeq = 0.1,
    workload: WorkloadName = None,
    trace: Trace = None,
    arrivals: Arrivals = "poisson",
    burstiness: Burstiness = 1.0,
    clip_gaps: ClipGaps = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """Latencies and throughput at given rates.

    With --plot, one policy at one rate gives a timeline of its first steps;
    several rates give latency-throughput curves.

    Example: jaxserve simulate run --policies sarathi,vllm_v0 --qps 0.3,0.6 --json
    """
    from jaxserve.simulator import plots
    from jaxserve.simulator.metrics import summary
    from jaxserve.simulator.run import simulate as simulate_run

    experiment = make_experiment(
        scenario, slo, token_budget, step_time_ms, max_num_seqs, buckets, stream_chunks,
        cost_model, profile, host_ms, host_ms_per_seq,
    )  # fmt: skip
    requests = make_requests(
        scenario, workload, trace, arrivals, burstiness, clip_gaps, num_requests, seed
    )
    rates, names = numbers_of("--qps", qps), names_of(policies)
    draw = None if plot is None else plots.start()
    runs: list[dict[str, Any]] = []
    steps = None
    for name in names:
        engine = experiment.engine(name)
        for rate in rates:
            done = simulate_run(engine, requests.at(rate), record_steps=draw is not None)
            runs.append({"policy": name, "qps": rate, **summary(done)})
            steps = done.stats.steps
    if draw is not None and plot is not None:
        if len(runs) == 1 and steps is not None:
            plots.timeline(draw, steps, plot)
        else:
            plots.curves(draw, runs, plot)
    print_result({"scenario": scenario, "seed": seed, "runs": runs}, as_json, _runs_table(runs))


@app.command()
def capacity(
    scenario: Scenario = "yi-34b-chat",
    slo: Slo = "strict",
    policies: Annotated[
        str, typer.Option(help="Comma-separated; ratios are of the first to the others.")
    ] = "sarathi,vllm_v0,orca",
    num_requests: NumRequests = 300,
    seeds: Annotated[str, typer.Option(help="One or more; the median counts.")] = "1",
    token_budget: TokenBudget = None,
    step_time_ms: StepTimeMs = None,
    max_num_seqs: MaxNumSeqs = None,
    buckets: Buckets = "",
    stream_chunks: StreamChunks = False,
    cost_model: CostModelName = "fitted",
    profile: Profile = None,
    host_ms: HostMs = 5.0,
    host_ms_per_seq: HostMsPerSeq = 0.1,
    workload: WorkloadName = None,
    trace: Trace = None,
    arrivals: Arrivals = "poisson",
    burstiness: Burstiness = 1.0,
    clip_gaps: ClipGaps = None,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """The highest rate with P99 time between tokens within the SLO and P50
    scheduling delay within 2 s, by bisection to 2.5 %.

    Example: jaxserve simulate capacity --scenario yi-34b-chat --slo strict --json
    """
    from jaxserve.simulator import plots
    from jaxserve.simulator.capacity import Objective, compare
    from jaxserve.simulator.scenarios import find_scenario

    experiment = make_experiment(
        scenario, slo, token_budget, step_time_ms, max_num_seqs, buckets, stream_chunks,
        cost_model, profile, host_ms, host_ms_per_seq,
    )  # fmt: skip
    draw = None if plot is None else plots.start()
    found = find_scenario(scenario)
    workloads = {
        int(seed): make_requests(
            scenario, workload, trace, arrivals, burstiness, clip_gaps, num_requests, int(seed)
        )
        for seed in numbers_of("--seeds", seeds)
    }
    comparison = compare(
        {name: experiment.engine(name) for name in names_of(policies)},
        workloads,
        Objective(found.slo_s(slo)),
        start_qps=found.start_qps,
    )
    result = {
        "scenario": scenario,
        "slo": slo,
        "slo_s": found.slo_s(slo),
        "num_requests": num_requests,
        "seeds": list(workloads),
        "token_budget": experiment.token_budget,
        "cost_model": cost_model,
        **comparison.summary(),
    }
    if draw is not None and plot is not None:
        plots.capacity_bars(draw, comparison.by_policy, f"{scenario}, {slo}", plot)
    table = Table("policy", "capacity, requests/s", "by seed")
    for name, by_seed in comparison.by_policy.items():
        table.add_row(
            name, f"{comparison.median(name):.3f}", ", ".join(f"{qps:.3f}" for qps in by_seed)
        )
    print_result(result, as_json, table)


@app.command()
def pipeline(
    num_requests: NumRequests = 1500,
    seed: Seed = 1,
    as_json: AsJson = False,
    plot: Plot = None,
) -> None:
    """GPT-3 on 64 GPUs: Orca and SARATHI over 8 pipeline stages, and 8 replicas
    without stages. Everything arrives at once; bubbles are a request's own.

    Example: jaxserve simulate pipeline --num-requests 1500 --json
    """
    from jaxserve.simulator import plots
    from jaxserve.simulator.pipeline import compare_pipelines

    draw = None if plot is None else plots.start()
    result = compare_pipelines(num_requests, seed, record_steps=draw is not None)
    if draw is not None and plot is not None:
        plots.timeline(draw, result.steps, plot)
    table = Table("system", "makespan, s", "median bubble of a request, s")
    for name, seconds in result.makespan_s.items():
        table.add_row(name, f"{seconds:.1f}", f"{result.median_bubble_s[name]:.3f}")
    print_result(result.summary(), as_json, table)


def _runs_table(runs: list[dict[str, Any]]) -> Table:
    table = Table("policy", "requests/s", "TTFT P50", "TBT P50", "TBT P99", "delay P50", "tokens/s")
    for one in runs:
        tbt = one["tbt_s"] or {"p50": 0.0, "p99": 0.0}
        table.add_row(
            one["policy"],
            f"{one['qps']:g}",
            f"{one['ttft_s']['p50']:.3f} s",
            f"{tbt['p50'] * 1e3:.1f} ms",
            f"{tbt['p99'] * 1e3:.1f} ms",
            f"{one['scheduling_delay_s']['p50']:.2f} s",
            f"{one['output_tokens_per_s']:.0f}",
        )
    return table


for _command in (cost, piggyback, fit):
    app.command()(_command)
