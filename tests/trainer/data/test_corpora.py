"""tools/get_corpus.py: what the packages hold is read right, and digests are checked."""

from __future__ import annotations

import gzip
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxserve.registry_packages import FetchError
from tools.corpora import texts, wordnet
from tools.corpora.catalog import CATALOG
from tools.get_corpus import fetch_corpus

ROOT = Path(__file__).parents[3]

NOUNS = """\
  1 This is the licence.
00001740 03 n 02 thing 0 Big_Thing 0 000 | that which is; "the thing was red"; a use
00001850 03 n 01 rarity 0 000 | not common
"""


def test_chats_come_from_wordnets_lines(tmp_path: Path) -> None:
    folder = tmp_path / "dict"
    folder.mkdir()
    for name in ("verb", "adj", "adv"):
        (folder / f"data.{name}").write_text("")
        (folder / f"index.{name}").write_text("  1 licence\n")
    (folder / "data.noun").write_text(NOUNS)
    offsets = [NOUNS.index("00001740"), NOUNS.index("00001850")]
    (folder / "index.noun").write_text(
        "  1 licence\n"
        f"big_thing n 1 1 @ 1 3 {offsets[0]:08}\n"
        f"rarity n 1 0 1 0 {offsets[1]:08}\n"  # never seen in the tagged texts
    )
    records = list(wordnet.chats(tmp_path))
    assert [record["id"] for record in records] == ["big_thing.noun"]
    messages = records[0]["messages"]
    assert [message["role"] for message in messages] == [
        *("system", "user", "assistant"),
        *("user", "assistant"),
    ]
    assert messages[1]["content"] == 'What does "Big Thing" mean as a noun?'
    assert messages[2]["content"] == "As a noun, Big Thing means: that which is; a use."
    assert messages[4]["content"] == "thing."


def test_dictionary_entries_are_read_once_and_in_order(tmp_path: Path) -> None:
    folder = tmp_path / "usr" / "share" / "dictd"
    folder.mkdir(parents=True)
    body = b"about this file\n" + b"A first.\n" * 20 + b"B second.\n"
    (folder / "gcide.dict.dz").write_bytes(gzip.compress(body))
    # Base 64: A is 0, Q is 16, C0 is 180, DE is 196.
    lines = ["00-database-info\tA\tQ", "Bee\tDE\tK", "Ay\tQ\tC0", "A\tQ\tC0"]
    (folder / "gcide.index").write_text("\n".join(lines) + "\n")
    pages = list(texts.dictionary_pages(tmp_path))
    first = "A first.\n" * 20
    assert [page["text"] for page in pages] == [f"{first.strip()}\n\nB second."]


def test_the_catalogue_is_complete() -> None:
    for name, corpus in CATALOG.items():
        assert corpus.name == name
        assert len(corpus.sha256) == len(corpus.package.sha256) == 64
        assert corpus.licence
        assert corpus.num_bytes > 10**6


def test_unknown_names_are_refused() -> None:
    command = [sys.executable, "tools/get_corpus.py", "mobydick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "no corpus mobydick" in done.stderr


@pytest.mark.long
def test_a_package_is_fetched_and_anything_else_is_refused(tmp_path: Path) -> None:
    assert shutil.which("npm"), "npm is needed for this test"
    corpus = CATALOG["moby-dick"]
    path = fetch_corpus(corpus, tmp_path, "txt")
    assert path.read_text().startswith("CHAPTER 1. Loomings.\n\nCall me Ishmael.")
    assert (tmp_path / "moby-dick.jsonl").stat().st_size == corpus.num_bytes
    assert sorted(file.name for file in tmp_path.iterdir()) == ["moby-dick.jsonl", "moby-dick.txt"]
    other = replace(corpus, name="other", package=replace(corpus.package, sha256="0" * 64))
    with pytest.raises(FetchError, match="not what was pinned"):
        fetch_corpus(other, tmp_path)
    changed = replace(corpus, name="changed", sha256="0" * 64)
    with pytest.raises(FetchError, match="came out with SHA-256"):
        fetch_corpus(changed, tmp_path)
