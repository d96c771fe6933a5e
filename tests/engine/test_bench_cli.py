from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jaxserve.cli.bench import app
from jaxserve.errors import ConfigError
from tests.engine.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def engine_options(tmp_path_factory: pytest.TempPathFactory, compilation_cache: Path) -> list[str]:
    options = {
        "--model": make_tiny_model(tmp_path_factory.mktemp("model") / "tiny"),
        "--dtype": "float32",
        "--token-budget": 8,
        "--buckets": "8",
        "--max-num-seqs": 4,
        "--compilation-cache-dir": compilation_cache,
    }
    return [str(part) for pair in options.items() for part in pair]


def run(*arguments: Any) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


def test_throughput_as_json(engine_options: list[str]) -> None:
    load = ("--num-requests", 6, "--input-len", 10, "--output-len", 5, "--concurrency", 3)
    result = run("throughput", "--json", *load, *engine_options)
    assert result.exit_code == 0
    figures = json.loads(result.stdout)
    assert figures["num_output_tokens"] == 30
    assert figures["num_prompt_tokens"] == 60
    assert figures["num_failed"] == 0
    assert figures["compiles_after_ready"] == 0
    assert figures["machine"]["dtype"] == "float32"
    assert figures["machine"]["buckets"] == [8]
    assert figures["load"]["concurrency"] == 3
    assert 0.0 < figures["mean_step_fill"] <= 1.0
    for name in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms", "step_ms"):
        assert 0.0 < figures[name]["p50"] <= figures[name]["p99"]
    assert 0.0 <= figures["host_gap_fraction"]["p50"] <= figures["host_gap_fraction"]["p99"]
    assert figures["output_tokens_per_s"] == pytest.approx(30 / figures["elapsed_s"])


def test_latency_of_given_prompts_as_a_table(tmp_path: Path, engine_options: list[str]) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    load = ("--num-requests", 3, "--output-len", 4, "--prompts", prompts)
    result = run("latency", *load, *engine_options)
    assert result.exit_code == 0
    assert "time to first token, ms" in result.stdout
    assert "0 compiles after READY" in " ".join(result.stdout.split())


def test_a_load_that_cannot_fit_is_an_error_with_the_fix(engine_options: list[str]) -> None:
    with pytest.raises(ConfigError, match="--max-model-len 64"):
        run("throughput", "--input-len", 60, "--output-len", 5, *engine_options)
