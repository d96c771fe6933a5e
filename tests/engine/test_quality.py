"""Perplexity through the served step, with weights as they are and quantised."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from typer.testing import CliRunner

from jaxserve.cli.bench import app
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.quality import measure_quality
from jaxserve.engine.startup import start_engine
from jaxserve.errors import ConfigError
from models.loading import open_model
from models.ops.attention.dense import dense_attend
from tests.server.tiny_model import write_tiny_model

SPEECHES = Path(__file__).parents[2] / "examples" / "train" / "data" / "speeches.jsonl"
TEXT = "Four score and seven years ago our fathers brought forth a new nation. " * 3
WINDOW = 71


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def perplexity_of_a_plain_forward(model: Path) -> float:
    source = open_model(model)
    params, config = source.load_params(jnp.float32), source.config
    positions = jnp.arange(WINDOW, dtype=jnp.int32)

    @jax.jit
    def logits_of(window: jax.Array) -> jax.Array:
        x = source.family.embed(params, config, window)
        x, _ = source.family.run_layers(params, config, x, positions, (), dense_attend(config))
        return source.family.logits(params, config, x)

    losses = []
    for window in np.array(source.load_tokenizer().encode(TEXT), np.int32).reshape(-1, WINDOW):
        logits = np.asarray(logits_of(window), np.float64)[:-1]
        log_sums = np.log(np.exp(logits).sum(axis=-1))
        losses.append(log_sums - logits[np.arange(len(logits)), window[1:]])
    return float(np.exp(np.concatenate(losses).mean()))


@pytest.mark.usefixtures("quick_compilation")
def test_the_command_tells_perplexity_and_what_8_bits_cost(
    model: Path, compilation_cache: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    flags = f"--max-model-len 96 --token-budget 16 --buckets one --max-num-seqs 4 --window {WINDOW}"
    command = ["quality", "--model", model, "--text", text, "--quantization", "int8", "--json"]
    command += ["--kv-cache-dtype", "int8"]
    command += [*flags.split(), "--compilation-cache-dir", compilation_cache]
    result = CliRunner().invoke(app, [str(part) for part in command], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    plain, int8, int8_pages, both = json.loads(result.stdout)["rows"]
    assert plain["perplexity"] == pytest.approx(perplexity_of_a_plain_forward(model), rel=1e-5)
    num_windows = len(TEXT) // WINDOW
    assert plain["num_tokens"] == int8["num_tokens"] == len(TEXT) - num_windows
    assert int8["weights_bytes"] < 0.75 * plain["weights_bytes"]
    assert 0 < abs(int8["cost"]) < 0.01
    assert int8["cost"] == int8["perplexity"] / plain["perplexity"] - 1
    # Two heads of two layers, keys and values: 8 floats, or 8 bytes and a scale.
    assert plain["kv_bytes_per_token"] == int8["kv_bytes_per_token"] == 2 * 2 * 2 * 8 * 4
    assert int8_pages["kv_bytes_per_token"] == both["kv_bytes_per_token"] == 2 * 2 * 2 * (8 + 4)
    assert 0 < abs(int8_pages["cost"]) < 0.01
    assert both["cost"] not in (int8["cost"], int8_pages["cost"])


def test_a_text_without_words_is_refused(tmp_path: Path) -> None:
    for name, content, message in (
        ("bad.jsonl", '{"id": 1}\n', "JSON lines with a field `text`"),
        ("bad.txt", b"\xff", "must be UTF-8"),
    ):
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError, match=message):
            CliRunner().invoke(app, ["quality", "--text", str(file)], catch_exceptions=False)
    with pytest.raises(ConfigError, match="fewer than two tokens"):
        measure_quality(None, [1], window=8)  # type: ignore[arg-type]


@pytest.mark.long
@pytest.mark.real_model
@pytest.mark.parametrize(("weight_format", "most_cost"), [("int8", 0.01)])
def test_smollm2_loses_little(
    weight_format: str, most_cost: float, compilation_cache: Path
) -> None:
    lines = SPEECHES.read_text(encoding="utf-8").splitlines()
    text = "\n\n".join(json.loads(line)["text"] for line in lines[:4])
    perplexities = []
    for quantization in ("none", weight_format):
        running = start_engine(
            EngineConfig(
                quantization=quantization,
                buckets="one",
                max_model_len=512,
                compilation_cache_dir=compilation_cache,
            )
        )
        try:
            ids = running.tokenizer.encode(text)[:384]
            perplexities.append(measure_quality(running.engine, ids, window=384).perplexity)
            assert running.engine.snapshot().compiles_after_ready == 0
        finally:
            running.close()
    assert 5 < perplexities[0] < 200
    assert abs(perplexities[1] / perplexities[0] - 1) < most_cost
