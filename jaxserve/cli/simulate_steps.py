"""Sub-commands of `simulate` about single steps: what they take, and fitting that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from jaxserve.cli.simulate_options import (
    AsJson,
    CostModelName,
    HostMs,
    HostMsPerSeq,
    Profile,
    print_result,
)
from jaxserve.errors import ConfigError


def cost(
    model: Annotated[str, typer.Option(help="mistral-7b, yi-34b, llama2-70b ...")] = "yi-34b",
    tensor_parallel: Annotated[int | None, typer.Option(min=1, show_default="published")] = None,
    pipeline_parallel: Annotated[int | None, typer.Option(min=1, show_default="published")] = None,
    device: Annotated[str, typer.Option(help="Only a100 has constants.")] = "a100",
    prefill_tokens: Annotated[int, typer.Option(min=0, help="Tokens of one prefill chunk.")] = 0,
    computed_tokens: Annotated[int, typer.Option(min=0, help="In front of the chunk.")] = 0,
    decode_batch: Annotated[int, typer.Option(min=0, help="Decodes in the step.")] = 0,
    context: Annotated[int, typer.Option(min=1, help="Keys that each of them reads.")] = 1024,
    cost_model: CostModelName = "fitted",
    profile: Profile = None,
    host_ms: HostMs = 0.0,
    host_ms_per_seq: HostMsPerSeq = 0.0,
    as_json: AsJson = False,
) -> None:
    """What one step takes: a prefill chunk, decodes, or both.

    With pipeline stages, of all of them; `stage_s` is one.

    Example: jaxserve simulate cost --model yi-34b --tensor-parallel 2 --prefill-tokens 1024
    """
    from jaxserve.engine.step_features import StepFeatures
    from jaxserve.simulator.cost_models.base import HostCost
    from jaxserve.simulator.deployments import find_deployment
    from jaxserve.simulator.experiment import make_cost_model

    if not (prefill_tokens or decode_batch):
        raise ConfigError("the step is empty: give --prefill-tokens, --decode-batch, or both")
    deployment = find_deployment(
        model,
        tensor_parallel=tensor_parallel,
        pipeline_parallel=pipeline_parallel,
        device=device,
    )
    host = HostCost(host_ms / 1e3, host_ms_per_seq / 1e3)
    step = StepFeatures.of_hybrid(decode_batch, context, prefill_tokens, computed_tokens)
    predict = make_cost_model(cost_model, deployment, host, profile=profile)
    stage = predict.stage_cost(step)
    stages = deployment.pipeline_parallel
    transfer_s = (stages - 1) * predict.transfer_s(step.num_tokens)
    values = {
        "step_time_s": stages * stage.total_s + transfer_s,
        "linear_s": stages * stage.linear_s,
        "attention_s": stages * stage.attention_s,
        "all_reduce_s": stages * stage.all_reduce_s,
        "elementwise_s": stages * stage.elementwise_s,
        "host_s": stages * stage.host_s,
        "transfer_s": transfer_s,
        "stage_s": stage.total_s,
    }
    table = Table("part", "ms")
    for key, seconds in values.items():
        table.add_row(key.removesuffix("_s"), f"{seconds * 1e3:.3f}")
    print_result(values, as_json, table)


def piggyback(
    as_json: AsJson = False,
) -> None:
    """SARATHI's gain from decodes that ride with prefill chunks (LLaMA-13B on
    an A6000), in closed form from a few measured times.

    Example: jaxserve simulate piggyback --json
    """
    from jaxserve.simulator.piggyback import published_cells, summary

    table = Table("context", "batch", "chunk", "prompt:output", "gain", "published")
    for cell in published_cells():
        table.add_row(
            str(cell.context),
            str(cell.batch),
            str(cell.chunk),
            f"{cell.prompt_per_output:g}",
            f"{cell.gain:.3f}",
            f"{cell.published_gain:.2f}",
        )
    print_result(summary(), as_json, table)


def fit(
    step_log: Annotated[Path, typer.Argument(help="JSON lines that an engine recorded.")],
    out: Annotated[Path | None, typer.Option(metavar="JSON", help="Keep the model.")] = None,
    as_json: AsJson = False,
) -> None:
    """A step-cost model from an engine's own recorded steps.

    Every second step is held out; the error is that of the steps held out.

    Example: jaxserve simulate fit steps.jsonl --json
    """
    from jaxserve.simulator.fitting import fit_step_log

    result = fit_step_log(step_log)
    values = result.summary()
    if out is not None:
        out.write_text(json.dumps(values["model"]) + "\n", encoding="utf-8")
    table = Table("", "")
    for key, value in values.items():
        table.add_row(key, json.dumps(value))
    print_result(values, as_json, table)
