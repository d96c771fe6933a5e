"""`jaxserve embed`: JSON lines or an array out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from jaxserve.cli.embed import app
from jaxserve.engine.config import EngineConfig
from jaxserve.engine.startup import start_engine
from jaxserve.errors import ConfigError
from tests.engine.tiny_model import make_tiny_model
from tests.server.tiny_encoder import GOLDEN, text_of, write_tiny_encoder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_encoder(tmp_path_factory.mktemp("encoder"))


def run(compilation_cache: Path, *arguments: object, stdin: str | None = None) -> Any:
    options = ["--compilation-cache-dir", compilation_cache, "--token-budget", 80, *arguments]
    return CliRunner().invoke(app, [str(a) for a in options], input=stdin, catch_exceptions=False)


def test_json_lines_and_an_array_hold_the_same_vectors(
    model: Path, compilation_cache: Path, tmp_path: Path
) -> None:
    arrays = np.load(GOLDEN / "rows.npz", allow_pickle=False)
    counts = arrays["num_tokens"]
    texts = [text_of(ids[:n]) for ids, n in zip(arrays["token_ids"], counts, strict=True)]
    means = arrays["rows"].sum(axis=1) / counts[:, None]
    expected = means / np.linalg.norm(means, axis=-1, keepdims=True)
    printed = run(compilation_cache, model, *texts)
    assert printed.exit_code == 0, printed.output
    rows = [json.loads(line) for line in printed.stdout.splitlines()]
    assert [row["text"] for row in rows] == texts
    assert [row["num_tokens"] for row in rows] == counts.tolist()
    np.testing.assert_allclose([row["embedding"] for row in rows], expected, rtol=0, atol=1e-5)
    array = tmp_path / "vectors.npy"
    lines = "\n".join(texts) + "\n"
    written = run(compilation_cache, model, "--input", "-", "--output", array, stdin=lines)
    assert written.exit_code == 0, written.output
    vectors = np.load(array, allow_pickle=False)
    assert vectors.dtype == np.float32
    np.testing.assert_array_equal(vectors, np.array([r["embedding"] for r in rows], np.float32))
    with pytest.raises(ConfigError, match="exists"):
        run(compilation_cache, model, "w1", "--output", array)
    with pytest.raises(ConfigError, match=r"texts\[1\]: has 21 tokens.*or add --truncate"):
        run(compilation_cache, model, "w1", "w2 " * 21)


def test_mistakes_are_named_before_a_model_is_opened(tmp_path: Path) -> None:
    for arguments, message in (
        (("m",), "give either TEXT"),
        (("m", "text", "--input", "-"), "give either TEXT"),
        (("m", "text", "--output", "vectors.json"), "must end in .npy"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(tmp_path, *arguments)


def test_the_wrong_kind_of_model_is_told_the_right_command(
    model: Path, compilation_cache: Path, tmp_path: Path
) -> None:
    decoder = make_tiny_model(tmp_path / "tiny")
    with pytest.raises(ConfigError, match="makes no embeddings: give an encoder"):
        run(compilation_cache, decoder, "text")
    with pytest.raises(ConfigError, match="generates no text: make embeddings with `jaxserve emb"):
        start_engine(EngineConfig(str(model)))
