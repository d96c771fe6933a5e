"""`jaxserve simulate` as a user meets it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jaxserve.cli.simulate import app
from jaxserve.engine.step_features import StepFeatures
from jaxserve.errors import ConfigError

RUNNER = CliRunner()


def call(*arguments: str) -> Any:
    result = RUNNER.invoke(app, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_cost_of_a_prefill_and_of_decodes() -> None:
    yi = ("cost", "--model", "yi-34b", "--tensor-parallel", "2")
    prefill = call(*yi, "--prefill-tokens", "1024")
    assert prefill["step_time_s"] == pytest.approx(0.200, rel=0.02)
    assert prefill["linear_s"] == pytest.approx(0.1612, rel=0.01)
    parts = ("linear_s", "attention_s", "all_reduce_s", "elementwise_s", "host_s", "transfer_s")
    assert sum(prefill[part] for part in parts) == pytest.approx(prefill["step_time_s"])
    decode = call(*yi, "--decode-batch", "32", "--context", "4096")
    assert decode["step_time_s"] == pytest.approx(0.0447, rel=0.02)
    falcon = call("cost", "--model", "falcon-180b", "--prefill-tokens", "4096")
    assert falcon["step_time_s"] == pytest.approx(2 * falcon["stage_s"] + falcon["transfer_s"])


def test_run_prints_percentiles_of_each_policy_and_rate() -> None:
    result = call(
        "run", "--policies", "sarathi,vllm_v0", "--qps", "0.3,0.6", "--num-requests", "30"
    )
    assert [(r["policy"], r["qps"]) for r in result["runs"]] == [
        ("sarathi", 0.3), ("sarathi", 0.6), ("vllm_v0", 0.3), ("vllm_v0", 0.6),
    ]  # fmt: skip
    for one in result["runs"]:
        assert one["num_requests"] == 30
        assert one["tbt_s"]["p50"] <= one["tbt_s"]["p99"] <= one["tbt_s"]["max"]
        assert one["ttft_s"]["p50"] > one["scheduling_delay_s"]["p50"] >= 0


def test_buckets_cost_more_than_exact_rows() -> None:
    """One bucket of 512 rows makes decode-only steps slow; two don't."""
    base = ("run", "--qps", "0.3", "--num-requests", "30")
    exact, one, two = (
        call(*base, *extra)["runs"][0]["tbt_s"]["p50"]
        for extra in ((), ("--buckets", "512"), ("--buckets", "128,512"))
    )
    assert exact <= two < 0.6 * one


def test_a_time_budget_keeps_every_step_under_its_target() -> None:
    arguments = ("run", "--qps", "0.8", "--num-requests", "40", "--token-budget", "2048")
    timed, rows = (
        call(*arguments, *extra)["runs"][0]["tbt_s"]["max"]
        for extra in (("--step-time-ms", "120"), ())
    )
    assert timed <= 0.121
    assert rows > 0.3


def test_tables_for_people() -> None:
    for arguments in (
        ["cost", "--prefill-tokens", "64"],
        ["run", "--num-requests", "5"],
        ["pipeline", "--num-requests", "24"],
        ["piggyback"],
    ):
        result = RUNNER.invoke(app, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        assert len(result.stdout.splitlines()) > 3


def test_fit_finds_the_coefficients_of_a_step_log(tmp_path: Path) -> None:
    log = tmp_path / "steps.jsonl"
    lines = []
    for index in range(60):
        step = StepFeatures.of_hybrid(index % 7 + 1, 64 * (index % 5 + 1), 16 * (index % 3))
        step = step._replace(num_rows_bucket=128 if step.num_tokens > 8 else 8)
        rows_s = {8: 0.002, 128: 0.009}[step.num_rows_bucket]
        duration_s = rows_s + 1e-6 * step.decode_context + 2e-6 * step.prefill_pairs
        lines.append(json.dumps(step._asdict() | {"duration_s": duration_s}))
    log.write_text("\n".join(lines) + "\n")
    out = tmp_path / "model.json"
    result = call("fit", str(log), "--out", str(out))
    assert result["mape"] < 0.001
    assert json.loads(out.read_text())["decode_context_s"] == pytest.approx(1e-6, rel=0.01)
    log.write_text('{"duration_s": 1}\n')
    with pytest.raises(ConfigError, match="line 1"):
        call("fit", str(log))


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["run", "--scenario", "nothing-chat"], "--scenario"),
        (["run", "--policies", "lifo"], "--policy"),
        (["run", "--qps", "fast"], "--qps"),
        (["capacity", "--slo", "soon"], "--slo"),
        (["cost", "--model", "yi-34b"], "--prefill-tokens"),
        (["cost", "--device", "a40", "--prefill-tokens", "8"], "--device"),
        (["run", "--cost-model", "guess"], "--cost-model"),
        (["run", "--cost-model", "table"], "--profile"),
    ],
)
def test_mistakes_name_the_option(arguments: list[str], hint: str) -> None:
    with pytest.raises(ConfigError, match=hint):
        call(*arguments)


def test_plots(tmp_path: Path) -> None:
    picture = tmp_path / "chart.png"
    arguments = ["run", "--num-requests", "5", "--plot", str(picture)]
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(ConfigError, match=r"jaxserve\[plot\]"):
            call(*arguments)
        return
    for extra in ([], ["--qps", "0.2,0.4"]):
        call(*arguments, *extra)
        assert picture.read_bytes().startswith(b"\x89PNG")
        picture.unlink()
    call("capacity", "--policies", "sarathi", "--num-requests", "20", "--plot", str(picture))
    assert picture.stat().st_size > 1000
