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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--temperature", -1), r"--temperature must be in \[0.0, 100.0\], not -1.0"),
        (("--top-p", 0), "--top-p must be in"),
        (("--repetition-penalty", 0), "--repetition-penalty must be in"),
        (("--presence-penalty", 3), "--presence-penalty must be in"),
        (("--frequency-penalty", -3), "--frequency-penalty must be in"),
        (("--max-tokens", 2, "--min-tokens", 3), "--min-tokens must be at most max_tokens"),
        (("--stop", ""), "--stop a stop string must not be empty"),
        (("--stop-token-ids", -1), "--stop-token-ids token id -1"),
    ],
)
def test_options_out_of_bounds_are_told_before_a_model_is_loaded(
    flags: tuple[Any, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run("hi", *flags, "--model", "never-loaded")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "top_p": 5}, "line 2: top_p: must be in"),
        ({"prompt": "a", "temprature": 1}, "line 2: temprature: is unknown"),
        ({"prompt_token_ids": []}, "line 2: prompt_token_ids: must not be empty"),
        ({"messages": []}, "line 2: messages: must not be empty"),
        ([1], "line 2: line: "),
    ],
)
def test_bad_lines_are_told_before_a_model_is_loaded(
    tmp_path: Path, line: object, message: str
) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"}, line)
    with pytest.raises(InvalidRequest, match=message):
        run("--input", source, "--output", tmp_path / "out", "--model", "never-loaded")
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


def test_options_reach_the_sampler(engine_options: list[str]) -> None:
    def complete(*flags: Any) -> dict[str, Any]:
        result = run("hi", "--json", "--temperature", 0, *flags, *engine_options)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    plain = complete("--max-tokens", 6, "--ignore-eos")["token_ids"]
    assert len(plain) == 6
    stopped = complete("--stop-token-ids", plain[1], "--stop-token-ids", 3, "--max-tokens", 6)
    assert stopped["token_ids"] == plain[: plain.index(plain[1]) + 1]
    assert stopped["finish_reason"] == "stop"
    held_off = complete("--stop-token-ids", plain[1], "--min-tokens", 4, "--max-tokens", 6)
    assert len(held_off["token_ids"]) >= 4
    penalised = complete(
        *("--repetition-penalty", 100, "--presence-penalty", 2, "--frequency-penalty", 2),
        *("--max-tokens", 6, "--ignore-eos"),
    )["token_ids"]
    assert len(set(penalised)) == 6


def test_a_failed_start_leaves_the_old_output_alone(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", {"prompt": "a"})
    existing = write_lines(tmp_path / "out.jsonl", {"keep": "me"})
    with pytest.raises(ConfigError, match="--model"):
        run("--input", source, "--output", existing, "--overwrite", "--model", tmp_path / "no")
    assert read_lines(existing) == [{"keep": "me"}]
    assert len(list(tmp_path.iterdir())) == 2
