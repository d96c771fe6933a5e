"""The committed example is what its commands make, through the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jaxserve.trainer.data.dataset import TokenDataset
from tests.trainer.data.rig import files_of

EXAMPLE = Path(__file__).parents[3] / "examples" / "train"


def jaxserve(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "jaxserve", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("name", "options"),
    [("speeches", ("--seq-len", 64)), ("chats", ("--kind", "chat", "--seq-len", 256))],
)
def test_the_prepared_example_is_up_to_date(
    tmp_path: Path, name: str, options: tuple[object, ...]
) -> None:
    source = EXAMPLE / "data" / f"{name}.jsonl"
    common = ("--tokenizer", EXAMPLE / "tokenizer", "--eval-fraction", 0.05)
    done = jaxserve("data", "prepare", source, "--out", tmp_path / name, *common, *options)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / name) == files_of(EXAMPLE / "data" / name)
    dataset = TokenDataset(tmp_path / name)
    assert f"train: {dataset.num_examples} examples" in done.stdout


def test_inspect_tells_what_is_there() -> None:
    done = jaxserve("data", "inspect", EXAMPLE / "data" / "chats", "--verify", "--show", 1)
    assert done.returncode == 0, done.stderr
    assert "all digests are right" in done.stdout
    assert "source chats.jsonl" in done.stdout
    # Answers are marked, questions are not.
    assert "<|im_start|>assistant\n»As a" in done.stdout
    assert "<|im_end|>«\n<|im_start|>user\n" in done.stdout


def test_a_mistake_is_one_line_with_the_place(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"text": "a"}\noops\n')
    arguments = ("--out", tmp_path / "out", "--tokenizer", EXAMPLE / "tokenizer")
    done = jaxserve("data", "prepare", source, *arguments)
    assert done.returncode == 2
    assert f"error: {source}, line 2: not valid JSON" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
