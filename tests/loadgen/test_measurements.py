"""The measurement itself: what counts as a gap, an interval, a good answer, a void run."""

from __future__ import annotations

import numpy as np
import pytest

from jaxserve.loadgen.records import GeneratorHealth, LoadRecord, RequestRecord, generator_health
from jaxserve.loadgen.schedule import PlannedRequest
from jaxserve.loadgen.slo import ServiceLevel
from jaxserve.loadgen.summary import distribution_ms, summarize

GOOD_HEALTH = GeneratorHealth(0.1, 0.0, 0.0, 0.0, 0.0)


def record(
    message_s: list[float], *, due_s: float = 0.0, tokens: int | None = None, status: str = "OK",
    is_measured: bool = True,
) -> RequestRecord:  # fmt: skip
    return RequestRecord(
        PlannedRequest(due_s, 10, 10, is_measured),
        sent_s=due_s + 0.001,
        message_s=message_s,
        num_tokens=len(message_s) if tokens is None else tokens,
        status=status,
        queue_s=0.002,
    )


def test_the_first_token_is_no_gap_and_a_preemption_is() -> None:
    one = record([1.0, 1.1, 1.2, 3.2, 3.3], due_s=0.5)
    assert one.ttft_s == pytest.approx(0.5)  # From the due time, not from the sending.
    assert one.tbt_s.tolist() == pytest.approx([0.1, 0.1, 2.0, 0.1])
    assert one.e2e_s == pytest.approx(2.8)
    assert one.tpot_s == pytest.approx(2.3 / 4)


def test_tokens_of_one_message_are_one_event() -> None:
    one = record([1.0, 2.0], tokens=6)
    assert one.tbt_s.tolist() == [1.0]
    assert one.tpot_s == pytest.approx(0.2)
    assert record([1.0]).tpot_s is None


def test_percentiles_and_their_maximum() -> None:
    figures = distribution_ms([np.arange(1, 101) / 1e3], np.random.default_rng(0))
    assert figures is not None
    assert (figures["num_values"], figures["max"]) == (100, pytest.approx(100))
    assert figures["p50"] == pytest.approx(50.5)
    assert figures["p99"] == pytest.approx(99.01)
    assert "max" not in figures["ci95"]
    assert distribution_ms([np.zeros(0)], np.random.default_rng(0)) is None


def test_intervals_resample_requests_not_gaps() -> None:
    """Half the requests are slow throughout: 50 gaps a request tell no more than one."""
    rng = np.random.default_rng(0)
    speeds = np.array([0.01] * 10 + [0.02] * 10)
    by_request = [np.full(50, speed) for speed in speeds]
    figures = distribution_ms(by_request, rng)
    single = distribution_ms([np.array([speed]) for speed in speeds], rng)
    assert figures is not None
    assert single is not None
    low, high = figures["ci95"]["mean"]
    lone_low, lone_high = single["ci95"]["mean"]
    assert high - low == pytest.approx(lone_high - lone_low, rel=0.25)
    # The standard error over 20 requests is 1.12 ms; over 1000 gaps it would be 0.16 ms.
    assert high - low == pytest.approx(2 * 1.96 * 1.12, rel=0.3)


def test_an_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        figures = distribution_ms([rng.exponential(0.01, 1) for _ in range(80)], rng)
        assert figures is not None
        low, high = figures["ci95"]["mean"]
        covered += low <= 10 <= high
    assert covered >= 33


def test_goodput_counts_requests_that_keep_both_goals() -> None:
    level = ServiceLevel(ttft_s=0.5, tbt_s=0.15)
    steady = record([0.4 + 0.1 * i for i in range(200)])
    one_stall = record([*(0.1 * i for i in range(150)), *(20 + 0.1 * i for i in range(50))])
    stalls = record([0.4, 1.0, 1.1, 1.2])
    late = record([0.9, 1.0])
    failed = record([0.1], status="RESOURCE_EXHAUSTED")
    assert [level.is_met_by(r) for r in (steady, one_stall, stalls, late, failed)] == [
        True,
        True,
        False,
        False,
        False,
    ]
    records = [steady, one_stall, stalls, late, failed]
    figures = summarize(LoadRecord(records, 25.0, GOOD_HEALTH), level)
    assert figures["goodput"]["attainment"] == pytest.approx(0.4)
    assert figures["goodput"]["requests_per_s"] == pytest.approx(2 / 25)
    assert (figures["num_failed"], figures["num_requests"]) == (1, 5)
    assert figures["status"] == {"OK": 4, "RESOURCE_EXHAUSTED": 1}


def test_the_ramp_is_left_out() -> None:
    warm_up = record([9.0, 90.0], is_measured=False)
    measured = record([11.0, 11.5], due_s=10.0)
    figures = summarize(LoadRecord([warm_up, measured], 11.5, GOOD_HEALTH), ServiceLevel())
    assert figures["ttft_ms"]["max"] == pytest.approx(1000)
    assert figures["tbt_ms"]["max"] == pytest.approx(500)
    assert figures["output_tokens_per_s"] == pytest.approx(2 / 1.5)
    assert (figures["num_requests"], figures["num_ramp_requests"]) == (1, 1)


def sent(lateness_s: list[float]) -> list[RequestRecord]:
    records = [record([1.0], due_s=0.1 * i) for i in range(len(lateness_s))]
    for one, late_s in zip(records, lateness_s, strict=True):
        one.sent_s = one.planned.due_s + late_s
    return records


def test_a_lagging_generator_voids_the_run() -> None:
    on_time = generator_health(sent([0.001] * 200), cpu_s=2.0, elapsed_s=20.0)
    assert on_time.void_reasons() == []
    assert on_time.cpu_share == pytest.approx(0.1)
    two_late = generator_health(sent([0.001] * 198 + [0.03, 0.001]), 2.0, 20.0)
    assert two_late.void_reasons() == []  # One in 200 is 0.5 %.
    many_late = generator_health(sent([0.03] * 3 + [0.001] * 197), 2.0, 20.0)
    assert "1.5% of the requests" in many_late.void_reasons()[0]
    falling_back = generator_health(sent([0.002 * i for i in range(200)]), 2.0, 20.0)
    assert any("longer than scheduled" in reason for reason in falling_back.void_reasons())
    saturated = generator_health(sent([0.001] * 200), cpu_s=19.0, elapsed_s=20.0)
    assert "95% of a core" in saturated.void_reasons()[0]
    figures = summarize(LoadRecord(sent([0.03] * 10), 20.0, many_late), ServiceLevel())
    assert figures["generator"]["void"] is True
