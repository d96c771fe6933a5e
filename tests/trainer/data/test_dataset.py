"""TokenDataset: damage is noticed, never read over."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.errors import DataError
from tests.trainer.data.rig import chats, write_jsonl
from tests.trainer.data.test_prepare import run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    source = write_jsonl(tmp_path / "a.jsonl", chats(60))
    return run(tmp_path / "out", source, kind="chat", seq_len=200, eval_fraction=0.2)


@pytest.mark.parametrize("split", ["train", "eval"])
@pytest.mark.parametrize("name", ["tokens.bin", "weights.bin", "documents.bin", "rows.bin"])
def test_a_flipped_bit_is_found_by_verify(folder: Path, split: str, name: str) -> None:
    TokenDataset(folder, split).verify()
    path = folder / split / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"{split}/{name} is damaged"):
        TokenDataset(folder, split).verify()


@pytest.mark.parametrize("name", ["tokens.bin", "weights.bin", "documents.bin", "rows.bin"])
def test_a_cut_or_missing_file_is_found_at_once(folder: Path, name: str) -> None:
    path = folder / "train" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"{name} has \d+ bytes"):
        TokenDataset(folder)
    path.unlink()
    with pytest.raises(DataError, match=rf"{name} is missing"):
        TokenDataset(folder)


def test_an_edited_manifest_is_found_at_once(folder: Path) -> None:
    path = folder / "dataset.json"
    fields = json.loads(path.read_text())
    fields["splits"]["train"]["num_examples"] += 1
    path.write_text(json.dumps(fields))
    with pytest.raises(DataError, match="its digest is wrong"):
        TokenDataset(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[]", "not the manifest"),
        (b'{"format": "jaxserve-tokens", "version": 99}', "version 99, not 1"),
    ],
)
def test_other_files_are_no_manifest(folder: Path, content: bytes, words: str) -> None:
    (folder / "dataset.json").write_bytes(content)
    with pytest.raises(DataError, match=words):
        TokenDataset(folder)


def test_damaged_rows_never_leave_the_file(folder: Path) -> None:
    """Even unverified: a row that points outside is refused, not clamped."""
    path = folder / "train" / "rows.bin"
    rows = np.fromfile(path, [("start", "<i8"), ("num_tokens", "<i4"), ("num_targets", "<i4")])
    for field, value in (("start", 2**40), ("start", -1), ("num_tokens", 10**6)):
        damaged = rows.copy()
        damaged[field][0] = value
        path.write_bytes(damaged.tobytes())
        with pytest.raises(DataError, match="a row leaves the tokens"):
            TokenDataset(folder).read(np.array([0]))


def test_wrong_ids_are_refused(folder: Path) -> None:
    dataset = TokenDataset(folder)
    for ids in ([-1], [dataset.num_examples]):
        with pytest.raises(DataError, match="example ids must be from 0"):
            dataset.read(np.array(ids))
        with pytest.raises(DataError, match="example ids must be from 0"):
            dataset.target_counts(np.array(ids))
    with pytest.raises(TypeError, match="int64"):
        dataset.read(np.array([0], np.int32))


def test_a_missing_split_or_set_is_named(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no split 'test', only train, eval"):
        TokenDataset(folder, "test")
    with pytest.raises(DataError, match="jaxserve data prepare"):
        TokenDataset(tmp_path)


def test_the_fingerprint_follows_the_content_only(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", chats(30))
    same = write_jsonl(tmp_path / "renamed.jsonl", chats(30))
    other = write_jsonl(tmp_path / "c.jsonl", chats(30, seed=1))
    prints = [
        TokenDataset(run(tmp_path / f"out{i}", path, kind="chat", seq_len=seq_len)).fingerprint
        for i, (path, seq_len) in enumerate([(first, 200), (same, 200), (first, 300), (other, 200)])
    ]
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3
