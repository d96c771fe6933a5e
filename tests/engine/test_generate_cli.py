from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jaxserve.cli.generate import app
from jaxserve.errors import ConfigError, InvalidRequest
from tests.engine.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def engine_options(model: Path, compilation_cache: Path) -> list[str]:
    options = {
        "--model": model,
        "--dtype": "float32",
        "--token-budget": 8,
        "--buckets": "8",
        "--max-num-seqs": 4,
        "--compilation-cache-dir": compilation_cache,
    }
    return [str(part) for pair in options.items() for part in pair]


def run(*arguments: Any, stdin: str | None = None) -> Any:
    return CliRunner().invoke(app, [str(a) for a in arguments], input=stdin, catch_exceptions=False)


def write_lines(path: Path, *values: object) -> Path:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


LINES = [
    {"id": "a", "prompt": "hello"},
    {"id": 2, "prompt_token_ids": [104, 105], "max_tokens": 1, "logprobs": 2},
    {"messages": [{"role": "user", "content": "x"}], "prompt_logprobs": 1},
    *({"id": f"n{i}", "prompt": "ab" * (i + 1), "max_tokens": 2 + 3 * (i % 5)} for i in range(12)),
]


def test_a_file_of_prompts_in_and_results_out_in_order(
    tmp_path: Path, engine_options: list[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", *LINES)
    target = tmp_path / "out.jsonl"
    sampling = ("--temperature", 0, "--max-tokens", 5)
    result = run("--input", source, "--output", target, *sampling, *engine_options)
    assert result.exit_code == 0, result.output
    rows = read_lines(target)
    assert [row["id"] for row in rows] == ["a", 2, 3, *(f"n{i}" for i in range(12))]
    for row in rows:
        assert row["finish_reason"] in ("length", "stop")
        assert row["usage"]["num_output_tokens"] == len(row["token_ids"])
    assert [row["usage"]["num_prompt_tokens"] for row in rows[:2]] == [5, 2]
    assert len(rows[1]["logprobs"]) == 1
    assert len(rows[1]["logprobs"][0]["top"]) == 2
    assert rows[0]["logprobs"] is None
    assert len(rows[2]["prompt_logprobs"]) == rows[2]["usage"]["num_prompt_tokens"] - 1
    assert not target.with_name("out.jsonl.partial").exists()
    # The same prompt alone gives the same answer.
    alone = run("hello", "--no-chat", "--json", *sampling, *engine_options)
    assert json.loads(alone.stdout)["token_ids"] == rows[0]["token_ids"]
    assert json.loads(alone.stdout)["text"] == rows[0]["text"]


def test_bad_lines_stop_the_job_before_it_begins(tmp_path: Path, engine_options: list[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, {"prompt": "a", "top_p": 5})
    target = tmp_path / "out.jsonl"
    with pytest.raises(InvalidRequest, match=r"line 2: top_p: must be in"):
        run("--input", source, "--output", target, *engine_options)
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_bad_lines_are_skipped_when_asked_through_pipes(engine_options: list[str]) -> None:
    lines = '{"id": "x", "prompt": 1}\n{"id": "y", "prompt": "hi"}\n'
    result = run(
        *("--input", "-", "--output", "-", "--on-error", "skip", "--max-tokens", 2, "--chat"),
        *engine_options,
        stdin=lines,
    )
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    assert first == {"id": "x", "error": "prompt: must be a string"}
    assert second["id"] == "y"
    assert second["usage"]["num_prompt_tokens"] == len("[user]hi[assistant]")


def test_a_prompt_uses_the_chat_template_and_prints_text(engine_options: list[str]) -> None:
    flags = ("--temperature", 0, "--max-tokens", 4, "--logprobs", 1)
    result = run("hi", *flags, *engine_options)
    assert result.exit_code == 0
    text, *tokens = result.stdout.split("\n")
    assert [token.split(" ")[0] for token in tokens[:4]] == [repr(character) for character in text]
    assert [token.split(" ")[2:4] for token in tokens[:4]] == [["(rank", "1)"]] * 4


def test_mistakes_are_told_before_a_model_is_loaded(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    existing = write_lines(tmp_path / "out.jsonl", {"keep": "me"})
    for arguments, message in (
        ((), "either a PROMPT or --input"),
        (("hi", "--input", source), "either a PROMPT or --input"),
        (("--input", source), "--output FILE"),
        (("hi", "--output", existing), "--output goes with --input"),
        (("--input", tmp_path / "none", "--output", "-"), "No such file"),
        (("--input", source, "--output", existing), "--overwrite"),
        (("--input", source, "--output", tmp_path / "no" / "where"), "cannot be written"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(*arguments, "--model", "never-loaded")
    assert read_lines(existing) == [{"keep": "me"}]


def test_a_failed_start_leaves_the_old_output_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    existing = write_lines(tmp_path / "out.jsonl", {"keep": "me"})
    with pytest.raises(ConfigError, match="--model"):
        run("--input", source, "--output", existing, "--overwrite", "--model", tmp_path / "no")
    assert read_lines(existing) == [{"keep": "me"}]
    assert len(list(tmp_path.iterdir())) == 2
