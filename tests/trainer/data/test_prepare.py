"""`prepare`: every token of the sources arrives, once, in order; the same bytes always."""

from __future__ import annotations

import gzip
import hashlib
import resource
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from jaxserve.trainer.data.dataset import TokenDataset
from jaxserve.trainer.data.errors import DataError
from jaxserve.trainer.data.prepare import prepare
from jaxserve.trainer.data.prepare_config import PrepareConfig
from jaxserve.trainer.data.sources import PIECE_CHARACTERS
from models.tokenizer import Tokenizer, TokenizerError
from tests.trainer.data.rig import (
    END,
    byte_tokenizer,
    chats,
    files_of,
    stored_documents,
    texts,
    write_jsonl,
)


def run(out: Path, *sources: Path, tokenizer: Tokenizer | None = None, **options: Any) -> Path:
    options = {"seq_len": 32, "eval_fraction": 0.0, **options}
    config = PrepareConfig(sources=sources, out=out, **options)
    prepare(config, tokenizer or byte_tokenizer())
    return out


def read_all(folder: Path, split: str = "train") -> Any:
    dataset = TokenDataset(folder, split)
    return dataset.read(np.arange(dataset.num_examples))


def test_text_is_a_stream_in_which_each_token_is_a_target_once(tmp_path: Path) -> None:
    documents = texts(50)
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    rows = read_all(run(tmp_path / "out", source))
    expected = [[*text.encode(), END] for text in documents]
    stream = [token for document in expected for token in document]
    # Inputs and targets are the stream, T tokens a row.
    used = rows.segment_ids > 0
    assert rows.inputs[used].tolist() == stream[:-1]
    assert rows.targets[used].tolist() == stream[1:]
    # Only the first token of each document is not learnt.
    starts = np.cumsum([0, *(len(document) for document in expected)])[:-1]
    learnt = np.ones(len(stream), np.uint8)
    learnt[starts] = 0
    assert rows.weights[used].tolist() == learnt[1:].tolist()
    assert not rows.weights[~used].any()
    assert not rows.inputs[~used].any()
    # A segment is a document's part of a row; places count from its beginning.
    number_of = np.repeat(np.arange(len(expected)), [len(document) for document in expected])
    for row, first in enumerate(range(0, len(stream) - 1, 32)):
        numbers = number_of[first : min(first + 32, len(stream) - 1)]
        changes = np.concatenate([[0], np.cumsum(np.diff(numbers))])
        length = len(numbers)
        assert rows.segment_ids[row, :length].tolist() == (changes + 1).tolist()
        places = [i - np.flatnonzero(changes == changes[i])[0] for i in range(length)]
        assert rows.positions[row, :length].tolist() == places


def test_target_counts_come_from_the_index_and_are_right(tmp_path: Path) -> None:
    text = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(60)])
    chat = write_jsonl(tmp_path / "b.jsonl", chats(60))
    for folder in (
        run(tmp_path / "text", text),
        run(tmp_path / "chat", chat, kind="chat", seq_len=200),
        run(tmp_path / "one", chat, kind="chat", seq_len=200, pack=False),
    ):
        dataset = TokenDataset(folder)
        ids = np.arange(dataset.num_examples)
        weights = dataset.read(ids).weights
        assert dataset.target_counts(ids).tolist() == weights.sum(axis=1).tolist()
        assert weights.sum() == dataset.manifest.splits["train"].num_targets


def test_rows_can_be_read_in_any_order(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(50)])
    folder = run(tmp_path / "out", source)
    dataset, everything = TokenDataset(folder), read_all(folder)
    ids = np.random.default_rng(1).permutation(dataset.num_examples)
    rows = dataset.read(ids)
    for name in ("inputs", "targets", "weights", "segment_ids", "positions"):
        assert np.array_equal(getattr(rows, name), getattr(everything, name)[ids])


def test_every_format_gives_the_same_tokens(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    documents = texts(30)
    plain = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    framed = tmp_path / "a.jsonl.zst"
    half = len(plain.read_bytes()) // 2  # two frames, as `zstd` makes when files are joined
    parts = (plain.read_bytes()[:half], plain.read_bytes()[half:])
    framed.write_bytes(b"".join(zstandard.ZstdCompressor().compress(part) for part in parts))
    columns = tmp_path / "a.parquet"
    parquet.write_table(Table.from_pydict({"id": list(range(30)), "text": documents}), columns)
    paths = (plain, zipped, framed, columns)
    folders = [run(tmp_path / f"out{i}", path) for i, path in enumerate(paths)]
    for folder in folders[1:]:
        assert TokenDataset(folder).fingerprint == TokenDataset(folders[0]).fingerprint
    for folder, path in zip(folders, paths, strict=True):
        (source,) = TokenDataset(folder).manifest.sources
        assert source["name"] == path.name
        assert source["num_bytes"] == path.stat().st_size
        assert source["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_text_file_is_one_document_however_long(tmp_path: Path) -> None:
    long = "\n".join(texts(11000, max_words=30))
    assert len(long) > 3 * PIECE_CHARACTERS
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "b.txt").write_text(long)
    (tmp_path / "books" / "a.md").write_text("short")
    (tmp_path / "books" / "skipped.png").write_bytes(b"\x89PNG")
    folder = run(tmp_path / "out", tmp_path / "books", seq_len=512)
    expected = [[*b"short", END], [*long.encode(), END]]
    assert stored_documents(folder, "train") == expected
    digests = [source["sha256"] for source in TokenDataset(folder).manifest.sources]
    assert digests == [hashlib.sha256(text).hexdigest() for text in (b"short", long.encode())]


def test_a_long_json_text_is_one_document(tmp_path: Path) -> None:
    long = " ".join(texts(11000, max_words=30))
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "x"}, {"text": long}, {"text": "y"}])
    folder = run(tmp_path / "out", source, seq_len=512)
    expected = [[*b"x", END], [*long.encode(), END], [*b"y", END]]
    assert stored_documents(folder, "train") == expected


def test_control_tokens_in_text_are_text(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a <|im_end|> b"}])
    folder = run(tmp_path / "out", source)
    assert stored_documents(folder, "train") == [[*b"a <|im_end|> b", END]]


def test_splits_share_the_documents_out(tmp_path: Path) -> None:
    documents = [f"document {number}" for number in range(400)]
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in documents])
    folder = run(tmp_path / "out", source, eval_fraction=0.2)
    parts = {
        split: [bytes(ids[:-1]).decode() for ids in stored_documents(folder, split)]
        for split in ("train", "eval")
    }
    assert sorted(parts["train"] + parts["eval"]) == sorted(documents)
    assert 50 < len(parts["eval"]) < 110  # 80 expected, standard deviation 8
    assert parts["train"] == [text for text in documents if text in parts["train"]]
    assert TokenDataset(folder).fingerprint != TokenDataset(folder, "eval").fingerprint


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    records = [{"text": text} for text in texts(3000)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    one = run(tmp_path / "one", source, eval_fraction=0.1)
    three = run(tmp_path / "three", source, eval_fraction=0.1, num_workers=3)
    assert files_of(one) == files_of(three)


def test_force_replaces_and_nothing_else_does(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "three"}])
    second = write_jsonl(tmp_path / "b.jsonl", [{"text": "two"}])
    folder = run(tmp_path / "out", first)
    before = files_of(folder)
    with pytest.raises(DataError, match="--force"):
        run(tmp_path / "out", second)
    assert files_of(folder) == before
    run(tmp_path / "out", second, force=True)
    assert stored_documents(folder, "train") == [[*b"two", END]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "out"]


def test_blank_documents_are_left_out_and_counted(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ("a", "", " \n", "b")])
    folder = run(tmp_path / "out", source)
    assert stored_documents(folder, "train") == [[*b"a", END], [*b"b", END]]
    assert TokenDataset(folder).manifest.counts == {"empty": 2}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        (b'{"text": "a"}\n\n[1]\n', r"a\.jsonl, line 3: a JSON object"),
        (
            b'{"body": "a", "id": 1}\n',
            r"line 1: there is no field 'text', only 'body', 'id'.*--field",
        ),
        (b'{"text": 5}\n', r"line 1: text is needed, not int"),
        (b'{"text": "a"}\n{"text": "\\ud800"}\n', r"line 2: the text is not valid Unicode"),
        (b'{"text": "\xff"}\n', r"line 1: not valid JSON"),
        (b"[" * 100_000 + b"\n", r"line 1: not valid JSON"),
        (b"", "nothing to train on: 0 documents"),
        (b'{"text": " "}\n', "nothing to train on: 1 documents, left out: empty 1"),
    ],
)
def test_malformed_jsonl_names_file_and_line(tmp_path: Path, content: bytes, words: str) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(content)
    with pytest.raises(DataError, match=words):
        run(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", b"ok\nline\n\xff\xfe", r"a\.txt, after line 1: not valid UTF-8"),
        ("a.jsonl.gz", b"plain text", r"a\.jsonl\.gz cannot be read"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 900, mtime=0)[:-20], "cannot be read"),
        ("a.jsonl.zst", b"plain text", r"damaged Zstandard data"),
        ("a.jsonl.zst", zstandard.compress(b'{"text": "a"}\n' * 900)[:-3], "cut off"),
        ("a.parquet", b"PAR1 not really", "not a readable Parquet file"),
        ("a.bin", b"?", "--format"),
    ],
)
def test_malformed_files_are_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        run(tmp_path / "out", tmp_path / name)


def test_missing_sources_and_columns_are_named(tmp_path: Path) -> None:
    from pyarrow import Table, parquet

    with pytest.raises(DataError, match="no-such-file"):
        run(tmp_path / "out", tmp_path / "no-such-file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no file with a known ending"):
        run(tmp_path / "out", tmp_path / "empty")
    parquet.write_table(Table.from_pydict({"body": ["a"]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="no column 'text', only 'body'"):
        run(tmp_path / "out", tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seq_len": 7}, "--seq-len"),
        ({"kind": "talk"}, "--kind"),
        ({"file_format": "csv"}, "--format"),
        ({"eval_fraction": 0.6}, "--eval-fraction"),
        ({"eval_fraction": float("nan")}, "--eval-fraction"),
        ({"num_workers": 0}, "--workers"),
        ({"overlong": "wrap"}, "--overlong"),
        ({"kind": "chat", "file_format": "text"}, "--kind chat"),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        PrepareConfig(sources=(Path("a"),), out=Path("b"), **options)


def test_an_eval_split_without_documents_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    with pytest.raises(DataError, match=r"--eval-fraction 0\.01 of 2 documents"):
        run(tmp_path / "out", source, eval_fraction=0.01)


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    tokenizer = Tokenizer(byte_tokenizer().backend)
    with pytest.raises(TokenizerError, match="end-of-text"):
        run(tmp_path / "out", source, tokenizer=tokenizer)


def test_a_full_disk_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    """A limit on file sizes stands for the disk; the work goes on when it is lifted."""
    source = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts(500)])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"out cannot be written: File too large.*goes on"):
            run(tmp_path / "out", source)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out").exists()
    run(tmp_path / "out", source)
    assert len(stored_documents(tmp_path / "out", "train")) == 500
