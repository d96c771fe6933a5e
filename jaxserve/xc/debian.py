"""Debian relations: from a package's description to the packages that it depends on or recommends.

A noisy set, as operations are: what is not related may well be right. Labels are packages of other
sources that at least two packages and less than 3 % of all are related to. Packages of one source
stay in one split, since their descriptions are nearly the same.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from jaxserve.registry_packages import FetchError, run_client
from jaxserve.xc.dataset import Origin
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.raw_data import Point, RawData, split_points

RELATIONS = ("Depends", "Recommends", "Suggests", "Enhances")
MIN_POINTS = 2
MAX_SHARE = 0.03


@dataclass(frozen=True)
class DebianLists:
    """The two files of a release that are read.

    Attributes:
        packages: the list of binary packages.
        translation: their long descriptions in English.
    """

    packages: Path
    translation: Path

    def origin(self) -> Origin:
        """With the digest of both files, since the lists of a release move."""
        digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in self._paths()]
        return Origin(
            name="debian-relations",
            package=f"Debian lists {self.packages.name} and {self.translation.name}",
            sha256=" ".join(digests),
            licence="descriptions are under the licences of their packages: not to be passed on as "
            "a whole",
        )

    def _paths(self) -> tuple[Path, Path]:
        return self.packages, self.translation


def fetch_lists(folder: Path) -> DebianLists:
    """Fetches the lists of the release that this machine is set up for, with apt-get.

    The system's own lists are not touched.

    Raises:
        FetchError: no apt-get, no network, or its sources have no main section.
    """
    (folder / "partial").mkdir(parents=True, exist_ok=True)
    options = {
        "Dir::State::Lists": str(folder),
        "Acquire::Languages": "en",
        "Acquire::GzipIndexes": "false",
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    run_client(["apt-get", "--quiet=2", *flags, "update"], folder)
    found = [
        min(
            (path for path in folder.glob(pattern) if not re.search("security|updates", path.name)),
            default=None,
        )
        for pattern in ("*_main_binary-*_Packages", "*_main_i18n_Translation-en")
    ]
    packages, translation = found
    if packages is None or translation is None:
        raise FetchError("apt-get fetched no list of Debian's main section: set up its sources")
    return DebianLists(packages, translation)


def read_relations(lists: DebianLists) -> RawData:
    """The data set. Raises XcDataError: the files are no Debian lists."""
    long_texts = {
        fields["Description-md5"]: fields.get("Description-en", "")
        for fields in paragraphs(lists.translation)
        if "Description-md5" in fields
    }
    packages = {fields["Package"]: fields for fields in paragraphs(lists.packages)
                if {"Package", "Description"} <= fields.keys()}  # fmt: skip
    if not packages:
        raise XcDataError(f"{lists.packages} lists no packages: give a Debian list, unpacked")
    return split_points(*related_packages(packages, long_texts))


def related_packages(
    packages: Mapping[str, Mapping[str, str]], long_texts: Mapping[str, str]
) -> tuple[list[Point], dict[str, str]]:
    """Points, and the texts of the labels by name.

    Args:
        packages: fields by name of package.
        long_texts: descriptions by the MD5 that `Description-md5` has.
    """
    related = {name: _related(fields, packages) for name, fields in packages.items()}
    counts = Counter(label for labels in related.values() for label in labels)
    num_points = sum(bool(labels) for labels in related.values())
    kept = {name for name, count in counts.items()
            if MIN_POINTS <= count < MAX_SHARE * num_points}  # fmt: skip
    points = []
    for name, labels in related.items():
        own = tuple(label for label in labels if label in kept)
        if own:
            fields = packages[name]
            text = long_texts.get(fields.get("Description-md5", ""), fields["Description"])
            points.append(Point(_source(fields), " ".join(text.split()), own))
    texts = {name: f"{name}: {packages[name]['Description']}" for name in kept}
    return points, texts


def paragraphs(path: Path) -> Iterator[dict[str, str]]:
    """The paragraphs of a control file: field to value, lines of a value joined by spaces."""
    fields: dict[str, str] = {}
    name = ""
    try:
        with path.open(encoding="utf-8") as file:
            for line in file:
                if not line.strip():
                    if fields:
                        yield fields
                    fields = {}
                elif line[0] in " \t":
                    fields[name] = f"{fields.get(name, '')} {line.strip(' .').strip()}"
                else:
                    name, _, value = line.partition(":")
                    fields[name] = value.strip()
    except (OSError, UnicodeDecodeError) as error:
        raise XcDataError(f"{path} cannot be read: {error}") from None
    if fields:
        yield fields


def _related(
    fields: Mapping[str, str], packages: Mapping[str, Mapping[str, str]]
) -> tuple[str, ...]:
    source = _source(fields)
    names = dict.fromkeys(
        name for relation in RELATIONS for name in _names(fields.get(relation, ""))
    )
    return tuple(name for name in names if name in packages and _source(packages[name]) != source)


def _names(relation: str) -> Iterable[str]:
    """`a (>= 1) | b, c` names a, b and c."""
    for part in re.split("[,|]", relation):
        name = part.split("(")[0].split(":")[0].split("[")[0].strip()
        if name:
            yield name


def _source(fields: Mapping[str, str]) -> str:
    return fields.get("Source", fields["Package"]).split(" ")[0]
