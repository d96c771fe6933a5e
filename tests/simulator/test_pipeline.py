"""Bubbles, piggy-backing and stability: SARATHI's results and what theory says."""

from __future__ import annotations

import pytest

from jaxserve.simulator.deployments import MODELS
from jaxserve.simulator.piggyback import best_prompt_per_output, published_cells
from jaxserve.simulator.pipeline import batch_that_fits, compare_pipelines
from jaxserve.simulator.stability import run_at_load


def test_gpt_3_batches_that_fit_in_memory() -> None:
    shape = MODELS["gpt-3"]
    assert batch_that_fits(shape, num_gpus=64, num_stages=8, max_model_len=4096) == 27
    assert batch_that_fits(shape, num_gpus=8, num_stages=1, max_model_len=4096) == 11


def test_chunks_fill_the_pipeline() -> None:
    """At 300 requests filling and draining count for more than at 10,000."""
    result = compare_pipelines(300, seed=1)
    bubbles, spans = result.median_bubble_s, result.makespan_s
    ours = "sarathi_tp8_pp8"
    assert bubbles["orca_tp8_pp8"] >= 6.29 * bubbles[ours]
    assert 1.3 <= spans["orca_tp8_pp8"] / spans[ours] <= 2.7
    assert 1.2 <= spans["orca_tp8"] / spans[ours] <= 1.7


def test_piggy_backing_gains_what_was_published() -> None:
    for cell in published_cells():
        assert cell.gain == pytest.approx(cell.published_gain, rel=0.05)
        assert cell.decode_speedup == pytest.approx(cell.published_decode_speedup, rel=0.05)


@pytest.mark.parametrize("chunk", [256, 512])
def test_the_gain_peaks_where_every_decode_just_rides(chunk: int) -> None:
    best = best_prompt_per_output(1024, 18, chunk)
    assert best == pytest.approx(chunk / 17, rel=0.15)


@pytest.mark.parametrize("policy", ["sarathi", "orca", "vllm_v1"])
def test_work_conserving_policies_keep_up_at_95_percent(policy: str) -> None:
    run = run_at_load(policy, 0.95, num_requests=3000, num_prompt=96, num_output=32)
    assert run.growth < 0.002
    assert run.late_delay_s < 1.0


@pytest.mark.parametrize("policy", ["fastertransformer", "vllm_v0"])
def test_others_fall_behind(policy: str) -> None:
    """As many output as prompt tokens: whole batches and stalls waste steps."""
    run = run_at_load(policy, 0.95, num_requests=2000, num_prompt=96, num_output=96)
    assert run.growth > 0.02
