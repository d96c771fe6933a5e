"""Each engine option, given as a user gives it: tokens come, and they come soon.

A start may take its time, a token may not: an option that makes a step copy
the pool or compile again shows here.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from jaxserve.cli.engine_options import with_engine_options
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.offline import join_outputs, stream
from jaxserve.engine.request import FinishReason, GenerationRequest
from jaxserve.engine.sampling_params import SamplingParams
from jaxserve.engine.startup import start_engine
from tests.server.tiny_model import write_tiny_model

NUM_TOKENS = 4
WITHIN_CPU_S = 5.0
"""CPU time of the process, which a busy machine does not stretch."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)

SMALL = "--max-num-seqs 4 --token-budget 16 "
"""With options that have nothing to do with the rows of steps: these compile sooner."""
FLAGS = [
    "",
    "--max-num-seqs 1",
    "--max-num-seqs 3",
    "--token-budget 1 --max-num-seqs 1",
    "--token-budget 48",
    "--buckets one",
    "--buckets 1,32",
    "--buckets 4",
    f"{SMALL}--dtype float32",
    f"{SMALL}--dtype bfloat16",
    f"{SMALL}--quantization int8",
    f"{SMALL}--kv-cache-dtype int8",
    f"{SMALL}--kv-cache-dtype fp8_e4m3",
    f"{SMALL}--page-size 1",
    f"{SMALL}--page-size 7",
    f"{SMALL}--max-model-len 64",
    f"{SMALL}--kv-cache-bytes 8MiB",
    f"{SMALL}--watermark 0.2",
    f"{SMALL}--no-prefix-caching",
    f"{SMALL}--max-queued-requests 1",
    f"{SMALL}--max-queued-tokens 1",
    "--slo-tbt-ms 2000",
    f"{SMALL}--slo-tbt-ms 2000 --step-budget time",
    f"{SMALL}--slo-tbt-ms 2000 --step-budget slack --slo-ttft-ms 9000",
]
"""Without --policy: `tests/scheduler/test_sizing.py` serves with each."""
REAL_FLAGS = [
    "--buckets 4,32 --dtype bfloat16 --page-size 7",
    "--policy vllm_v0 --max-model-len 512",
]
"""Those whose steps are other programs than the default ones."""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


def parse(*arguments: str) -> EngineConfig:
    """The config that these options make."""
    configs: list[EngineConfig] = []
    app = typer.Typer(add_completion=False)

    @app.command()
    @with_engine_options
    def keep(engine_config: EngineConfig) -> None:
        configs.append(engine_config)

    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return configs[0]


def tokens_come_soon(flags: str, model: Path, cache: Path) -> None:
    config = parse(*("--model", str(model), "--compilation-cache-dir", str(cache)), *flags.split())
    running = start_engine(config)
    try:
        # More than the smallest bucket and page, so that prefill and decode both run.
        prompt = tuple(running.tokenizer.encode("Once upon a time there was a small green frog"))
        start_s = time.process_time()
        request = GenerationRequest("flags", prompt, GREEDY)
        completion = join_outputs(list(stream(running.engine, request)))
        took_s = time.process_time() - start_s
        snapshot = running.engine.snapshot()
    finally:
        running.close()
    assert len(completion.token_ids) == NUM_TOKENS
    assert completion.finish_reason is FinishReason.LENGTH
    assert took_s < WITHIN_CPU_S
    assert snapshot.compiles_after_ready == 0


@pytest.mark.long
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("flags", FLAGS, ids=lambda flags: flags or "none")
def test_an_option_works_on_a_tiny_model(
    tiny_model: Path, compilation_cache: Path, flags: str
) -> None:
    tokens_come_soon(flags, tiny_model, compilation_cache)


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.parametrize("flags", REAL_FLAGS)
def test_an_option_works_on_the_default_model(
    smollm2_path: Path, compilation_cache: Path, flags: str
) -> None:
    tokens_come_soon(flags, smollm2_path, compilation_cache)
