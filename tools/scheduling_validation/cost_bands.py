"""V9 to V11: GPT-3's pipeline, SARATHI's table, and the cost model itself."""

from __future__ import annotations

import math
from functools import partial

from jaxserve.engine.step_features import StepFeatures
from jaxserve.simulator.cost_models.base import NO_HOST_COST
from jaxserve.simulator.deployments import find_deployment
from jaxserve.simulator.experiment import make_cost_model
from jaxserve.simulator.piggyback import published_cells, summary
from jaxserve.simulator.pipeline import compare_pipelines
from tools.scheduling_validation.finding import Finding, Settings

PIPELINE_REQUESTS = 1500


def v9(settings: Settings) -> list[Finding]:
    """GPT-3 on 64 GPUs."""
    runs = list(settings.pool.map(partial(compare_pipelines, PIPELINE_REQUESTS), settings.seeds))
    results = [run.summary() for run in runs]
    batches = [run.max_num_seqs for run in runs]
    spans = [run.makespan_s for run in runs]
    ours = "sarathi_tp8_pp8"
    ratios = tuple(float(str(result["bubble_ratio"])) for result in results)
    return [
        Finding("V9", "batch, TP8 PP8", tuple(float(b[ours]) for b in batches), 27, 27),
        Finding("V9", "batch, TP8", tuple(float(b["orca_tp8"]) for b in batches), 11, 11),
        Finding("V9", "median bubble orca / sarathi", ratios, 6.29, math.inf),
        Finding("V9", "time orca / sarathi, TP8 PP8",
                tuple(s["orca_tp8_pp8"] / s[ours] for s in spans), 1.6, 2.7),
        Finding("V9", "time TP8 alone / sarathi TP8 PP8",
                tuple(s["orca_tp8"] / s[ours] for s in spans), 1.25, 1.7),
    ]  # fmt: skip


def v10(_: Settings) -> list[Finding]:
    """SARATHI's table for LLaMA-13B, relative to the published values."""
    findings = []
    for cell in published_cells():
        name = f"LLaMA-13B {cell.context} tokens"
        gain = cell.gain / cell.published_gain
        speedup = cell.decode_speedup / cell.published_decode_speedup
        findings += [
            Finding("V10", f"{name}: gain / published", (gain,), 0.95, 1.05),
            Finding("V10", f"{name}: decode speed-up / published", (speedup,), 0.95, 1.05),
        ]
    for peak in summary()["peaks"]:
        ratio = peak["best_prompt_per_output"] / peak["chunk_per_rider"]
        findings.append(
            Finding("V10", f"best P:D / (C / (B - 1)), C = {peak['chunk']}", (ratio,), 0.85, 1.15)
        )
    return findings


def v11(_: Settings) -> list[Finding]:
    """The cost model: published SLO bases, and the reference times of its constants."""
    yi = make_cost_model("fitted", find_deployment("yi-34b"), NO_HOST_COST)
    mistral = make_cost_model("fitted", find_deployment("mistral-7b"), NO_HOST_COST)
    base = StepFeatures.of_decodes(32, 4096)
    findings = []
    for short, model, published_s in (("Yi", yi, 0.040), ("Mistral", mistral, 0.020)):
        name = f"{short} decode 32 x 4096 / published {published_s * 1e3:g} ms"
        findings.append(Finding("V11", name, (model.predict_s(base) / published_s,), 0.85, 1.15))
    reference_ms = {512: 101, 1024: 200, 2048: 370, 4096: 762, 8192: 1629, 16384: 3708}
    for tokens, milliseconds in reference_ms.items():
        ratio = yi.predict_s(StepFeatures.of_prefill(tokens)) * 1e3 / milliseconds
        findings.append(Finding("V11", f"Yi prefill {tokens} / reference", (ratio,), 0.98, 1.02))
    for chunk, overhead in ((512, 1.125), (1024, 1.105), (2048, 1.005)):
        chunks_s = sum(
            yi.predict_s(StepFeatures.of_prefill(chunk, start)) for start in range(0, 4096, chunk)
        )
        difference = chunks_s / yi.predict_s(StepFeatures.of_prefill(4096)) - overhead
        findings.append(
            Finding(
                "V11", f"Yi chunk overhead {chunk} of 4096 - reference", (difference,), -0.08, 0.08
            )
        )
    return findings
