"""Lengths and arrivals: published quantiles, rates, determinism, user's files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxserve.errors import ConfigError
from jaxserve.simulator.arrivals import ArrivalProcess
from jaxserve.simulator.experiment import make_workload
from jaxserve.simulator.workloads import sample_lengths, workload_names, zipf_lengths


@pytest.mark.parametrize(
    ("workload", "max_model_len", "prompts", "outputs"),
    [
        ("sharegpt", 8192, (1730, 5696), (415, 834)),
        ("arxiv", 16384, (7059, 12985), (208, 371)),
        ("azure_conv", 16384, (1020, 2734), (129, 424)),
        ("azure_code", 16384, (1469, 5188), (13, 55)),
    ],
)
def test_quantiles_are_the_published_ones(
    workload: str, max_model_len: int, prompts: tuple[int, int], outputs: tuple[int, int]
) -> None:
    drawn = np.array(sample_lengths(workload, 4000, 1, max_model_len=max_model_len))
    assert drawn.min() >= 1
    assert drawn.sum(axis=1).max() <= max_model_len
    # Long requests are left out, which lowers the upper quantiles.
    np.testing.assert_allclose(np.percentile(drawn[:, 0], (50, 90)), prompts, rtol=0.11)
    np.testing.assert_allclose(np.percentile(drawn[:, 1], (50, 90)), outputs, rtol=0.11)


def test_lengths_follow_the_seed_and_a_longer_run_begins_the_same() -> None:
    for workload in workload_names():
        short = sample_lengths(workload, 50, 3, max_model_len=8192)
        assert short == sample_lengths(workload, 400, 3, max_model_len=8192)[:50]
        assert short != sample_lengths(workload, 50, 4, max_model_len=8192)


def test_zipf_lengths() -> None:
    drawn = np.array(zipf_lengths(2000, 1, least=1024, most=4096, theta=0.4, prompt_share=10))
    totals = drawn.sum(axis=1)
    assert totals.min() >= 1024
    assert totals.max() <= 4096
    # Mean of k**-0.4 on [1024, 4096]: the integral of k**0.6 over that of k**-0.4.
    mean = (4096**1.6 - 1024**1.6) / 1.6 / ((4096**0.6 - 1024**0.6) / 0.6)
    assert totals.mean() == pytest.approx(mean, rel=0.02)
    np.testing.assert_allclose(drawn[:, 0] / drawn[:, 1], 10, rtol=0.01)


def test_poisson_is_not_clipped_and_gamma_is_bursty() -> None:
    count = 20_000
    gaps = np.diff(ArrivalProcess().unit_times_s(count, 1))
    assert gaps.mean() == pytest.approx(1.0, rel=0.03)
    assert gaps.var() == pytest.approx(1.0, rel=0.05)
    assert gaps.max() > 5
    clipped = np.diff(ArrivalProcess(clip=3.0).unit_times_s(count, 1))
    assert clipped.max() == pytest.approx(3.0)
    assert clipped.mean() == pytest.approx(0.950, rel=0.03)
    bursty = np.diff(ArrivalProcess("gamma", burstiness=4.0).unit_times_s(count, 1))
    assert bursty.mean() == pytest.approx(1.0, rel=0.06)
    assert bursty.var() == pytest.approx(4.0, rel=0.1)


def write_trace(path: Path, header: str, rows: list[str]) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def test_replay_keeps_the_trace_s_pattern(tmp_path: Path) -> None:
    rows = [f"{time},{10 + time},{1 + time}" for time in (0, 1, 1, 4, 8)]
    trace = write_trace(tmp_path / "t.csv", "arrived_at,num_prefill_tokens,num_decode_tokens", rows)
    workload = make_workload(
        "", 5, 1, max_model_len=100, arrivals=ArrivalProcess("replay"), trace=trace
    )
    requests = workload.at(5 / 8)  # The trace's own rate.
    assert [request.arrival_s for request in requests] == pytest.approx([0, 1, 1, 4, 8])
    assert requests[3].lengths == (14, 5)
    # Twice the rate, twice as dense; and a shuffle when arrivals are generated.
    assert workload.at(10 / 8)[-1].arrival_s == pytest.approx(4)
    drawn = make_workload("", 4, 1, max_model_len=100, arrivals=ArrivalProcess(), trace=trace)
    assert set(drawn.lengths) <= {(10 + t, 1 + t) for t in (0, 1, 4, 8)}


def test_bad_files_and_names_are_refused(tmp_path: Path) -> None:
    poisson = ArrivalProcess()
    wrong = write_trace(tmp_path / "w.csv", "a,b", ["1,2"])
    with pytest.raises(ConfigError, match="num_prefill_tokens"):
        make_workload("", 1, 1, max_model_len=100, arrivals=poisson, trace=wrong)
    header = "num_prefill_tokens,num_decode_tokens"
    short = write_trace(tmp_path / "s.csv", header, ["5,5", "90,90"])
    with pytest.raises(ConfigError, match="--num-requests"):
        make_workload("", 2, 1, max_model_len=100, arrivals=poisson, trace=short)
    with pytest.raises(ConfigError, match="arrived_at"):
        make_workload("", 1, 1, max_model_len=100, arrivals=ArrivalProcess("replay"), trace=short)
    text = write_trace(tmp_path / "x.csv", header, ["five,5"])
    with pytest.raises(ConfigError, match="no number"):
        make_workload("", 1, 1, max_model_len=100, arrivals=poisson, trace=text)
    with pytest.raises(ConfigError, match="cannot be read"):
        make_workload("", 1, 1, max_model_len=100, arrivals=poisson, trace=tmp_path / "no.csv")
    with pytest.raises(ConfigError, match="--workload"):
        sample_lengths("nothing", 1, 1, max_model_len=100)
    with pytest.raises(ConfigError, match="--max-model-len"):
        sample_lengths("sharegpt", 1, 1, max_model_len=2)
    with pytest.raises(ConfigError, match="--arrivals"):
        ArrivalProcess("uniform")
    with pytest.raises(ConfigError, match="positive"):
        ArrivalProcess("gamma", burstiness=0)
