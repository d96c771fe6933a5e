"""Data sets: the repository's formats, hash splits, WordNet and Debian files, damage."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from jaxserve.cli.data_xc import WordnetSource
from jaxserve.registry_packages import FetchError
from jaxserve.xc.dataset import XcDataset, write_dataset
from jaxserve.xc.debian import DebianLists, read_relations
from jaxserve.xc.errors import XcDataError
from jaxserve.xc.raw_data import Point, read_repository_folder, split_of, split_points
from jaxserve.xc.wordnet import SOURCES, read_hypernyms
from jaxserve.xc.xc_format import read_label_matrix, read_pairs, read_records
from tests.xc.tiny_xc import ORIGIN, tiny_dataset, tiny_raw, tiny_tokenizer


def _gz(path: Path, records: list[dict]) -> None:
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def test_json_files_of_the_repository_are_read_as_they_are(tmp_path: Path) -> None:
    labels = [{"uid": f"B{n}", "title": f"label {n}", "content": "", "target_ind": []}
              for n in range(3)]  # fmt: skip
    points = [{"uid": f"A{n}", "title": "Title", "content": f"text\n{n}",
               "target_ind": [n % 3], "target_rel": [1.0]} for n in range(40)]  # fmt: skip
    _gz(tmp_path / "lbl.json.gz", labels)
    _gz(tmp_path / "trn.json.gz", [*points, {"uid": "empty", "title": "x", "target_ind": []}])
    _gz(tmp_path / "tst.json.gz", points[:5])
    (tmp_path / "filter_labels_test.txt").write_text("0 1\n4 2\n")
    data = read_repository_folder(tmp_path)
    assert data.label_texts == ["label 0", "label 1", "label 2"]
    assert data.counts == {"training points without a label": 1}
    train, validation, test = (data.splits[name] for name in ("train", "validation", "test"))
    assert len(train.texts) + len(validation.texts) == 40
    assert 0 < len(validation.texts) < 12
    assert test.texts[3] == "Title text 3"
    assert test.labels[4].tolist() == [1]
    assert test.excluded.tolist() == [[0, 1], [4, 2]]


def test_sparse_files_and_raw_texts_are_read(tmp_path: Path) -> None:
    (tmp_path / "raw_data").mkdir()
    for short, name in (("trn", "train"), ("tst", "test")):
        (tmp_path / f"{short}_X_Y.txt").write_text("3 2\n0:1.0\n0:1 1:1\n1:1.00\n")
        (tmp_path / "raw_data" / f"{name}.raw.txt").write_text("a\nb\nc\n")
    (tmp_path / "raw_data" / "label.raw.txt").write_text("first\nsecond\n")
    data = read_repository_folder(tmp_path)
    assert [data.splits["test"].labels[point].tolist() for point in range(3)] == [[0], [0, 1], [1]]
    bag = tmp_path / "train.txt"
    bag.write_text("3 9 4\n1,3 0:0.5 7:1.5\n2:1.0\n0 5:1\n")
    assert [row.tolist() for row in map(read_label_matrix(bag).__getitem__, range(3))] == [
        [1, 3], [], [0],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "x 2\n", "line 1: 'x 2' is no header"),
        ("a.txt", "1 2\n0=1\n", "line 2: '0=1' must be column:value"),
        ("a.txt", "2 2\n0:1\n", "has 1 rows, but its header says 2"),
        ("a.txt", "1 2\n2:1\n", "0 to 1"),
    ],
)
def test_a_malformed_matrix_is_named_by_line(
    tmp_path: Path, name: str, content: str, said: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(XcDataError, match=said):
        read_label_matrix(tmp_path / name)


def test_malformed_records_pairs_and_folders_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"title": "x"}\n{"title": 3}\n')
    with pytest.raises(XcDataError, match=r"a\.json, line 2: title and content must be text"):
        list(read_records(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('{"target_ind": [-1]}\n')
    with pytest.raises(XcDataError, match="whole numbers"):
        list(read_records(tmp_path / "b.json"))
    (tmp_path / "pairs.txt").write_text("1 2\n3\n")
    with pytest.raises(XcDataError, match="line 2: two numbers"):
        read_pairs(tmp_path / "pairs.txt")
    with pytest.raises(XcDataError, match=r"neither lbl\.json\.gz nor trn_X_Y\.txt"):
        read_repository_folder(tmp_path)


def test_splits_depend_on_the_key_alone() -> None:
    shares = [split_of(f"n{number:08d}") for number in range(4000)]
    assert shares.count("train") / 4000 == pytest.approx(0.72, abs=0.03)
    assert shares.count("validation") / 4000 == pytest.approx(0.08, abs=0.02)
    # Pinned: whoever changes the hash changes every published figure.
    assert [split_of(key) for key in ("n00001740", "n00000002", "point-1")] == PINNED_SPLITS
    data = split_points(
        [Point(f"n{number}", f"text {number}", ("all", f"own-{number}")) for number in range(50)],
        {"all": "All", **{f"own-{number}": "Own" for number in range(50)}},
    )
    num_train = len(data.splits["train"].texts)
    assert data.label_texts.count("Own") == num_train
    assert data.counts["labels without a training point"] == 50 - num_train
    assert data.splits["train"].labels.label_counts().min() == 1


PINNED_SPLITS = ["train", "test", "validation"]

NOUNS = """\
  1 This software and database is being provided to you under a licence
00000001 03 n 01 entity 0 000 | that which exists
00000002 03 n 02 thing 0 object 1 002 @ 00000001 n 0000 ~ 00000003 n 0000 | a separate entity; "the thing"
00000003 05 n 01 living_thing 0 001 @ 00000002 n 0000 | what lives
00000004 05 n 01 animal 0 001 @ 00000003 n 0000 | a living thing that moves
00000006 05 n 01 dog 0 002 @ 00000004 n 0000 @i 00000002 n 0000 | it barks
"""  # noqa: E501


def test_hypernyms_up_to_three_levels(tmp_path: Path) -> None:
    (tmp_path / "data.noun").write_text(NOUNS)
    (tmp_path / "data.verb").write_text(
        "00000009 29 v 01 bark 0 001 @ 00000010 v 0000 01 + 02 00 | to make its sound\n"
        "00000010 29 v 01 sound 0 000 00 | to be heard\n"
    )
    data = read_hypernyms(tmp_path)
    texts = {text for split in data.splits.values() for text in split.texts}
    assert texts <= {'a separate entity; "the thing"', "what lives", "a living thing that moves",
                     "it barks", "to make its sound"}  # fmt: skip
    assert set(data.label_texts) <= {
        "entity: that which exists", "thing, object: a separate entity",
        "living thing: what lives", "animal: a living thing that moves", "sound: to be heard",
    }  # fmt: skip
    train = data.splits["train"]
    by_text = {text: {data.label_texts[label].split(":")[0] for label in train.labels[place]}
               for place, text in enumerate(train.texts)}  # fmt: skip
    # The dog is an animal, a living thing and a thing (twice), but four levels from the entity
    # by one road, and two by the other.
    assert by_text["it barks"] == {"animal", "thing, object", "living thing", "entity"}
    (tmp_path / "data.noun").write_text("nonsense\n")
    with pytest.raises(XcDataError, match=r"data\.noun, line 1"):
        read_hypernyms(tmp_path)


def test_wordnet_comes_from_the_sources_that_the_command_offers(tmp_path: Path) -> None:
    assert set(get_args(WordnetSource)) == set(SOURCES)
    archive = tmp_path / "other.deb"
    archive.write_bytes(b"no package")
    for source in SOURCES.values():
        assert source.origin.package == source.package.label
        with pytest.raises(FetchError, match="it is not what was pinned"):
            source.package.unpack(tmp_path, archive)


def test_debian_relations_of_other_sources(tmp_path: Path) -> None:
    packages, translation = [], []
    for number in range(120):
        name = f"app{number}"
        packages.append(
            f"Package: {name}\nSource: src{number} (1.0)\nDepends: libone{number % 60} (>= 2) | x, "
            f"{name}-data\nDescription: does {number}\nDescription-md5: m{number}\n"
        )
        packages.append(f"Package: {name}-data\nSource: src{number}\nDescription: data\n")
        translation.append(
            f"Package: {name}\nDescription-md5: m{number}\nDescription-en: does {number}\n"
            f" long text {number}\n .\n more\n"
        )
    packages += [f"Package: libone{n}\nDescription: library {n}\n" for n in range(60)]
    (tmp_path / "Packages").write_text("\n".join(packages))
    (tmp_path / "Translation-en").write_text("\n".join(translation))
    lists = DebianLists(tmp_path / "Packages", tmp_path / "Translation-en")
    data = read_relations(lists)
    assert all(text.startswith("libone") for text in data.label_texts)
    texts = [text for split in data.splits.values() for text in split.texts]
    assert "does 7 long text 7 more" in texts
    assert len(lists.origin().sha256 or "") == 129  # Two digests and a space.


def test_a_data_set_is_written_whole_and_damage_is_seen(tmp_path: Path) -> None:
    dataset = tiny_dataset(tmp_path)
    raw = tiny_raw()
    train, written = raw.splits["train"], dataset.split("train")
    assert dataset.texts("train") == train.texts
    assert dataset.label_texts() == raw.label_texts
    assert written.labels.label_ids.tolist() == train.labels.label_ids.tolist()
    tokenizer = tiny_tokenizer()
    for place in (0, 5):
        ids = tokenizer.encode(train.texts[place])
        assert written.texts.tokens[place, : written.texts.lengths[place]].tolist() == ids
    again = write_dataset(tmp_path / "again", raw, ORIGIN, tokenizer, 6)
    assert again.fingerprint == dataset.fingerprint
    dataset.verify()
    with pytest.raises(XcDataError, match="there already"):
        write_dataset(tmp_path / "xc", raw, ORIGIN, tokenizer, 6)
    path = tmp_path / "xc" / "train" / "label_ids.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(XcDataError, match=r"label_ids\.npy is damaged"):
        XcDataset(tmp_path / "xc").verify()
    path.write_bytes(content[:-1])
    with pytest.raises(XcDataError, match="another size"):
        XcDataset(tmp_path / "xc")
    with pytest.raises(XcDataError, match="holds no data set"):
        XcDataset(tmp_path / "nothing")


def test_empty_texts_and_long_ones(tmp_path: Path) -> None:
    from jaxserve.xc.dataset import tokenise

    texts = tokenise(tiny_tokenizer(), ["", "w0x0 " * 9], 4)
    assert texts.lengths.tolist() == [1, 4]
    assert np.asarray(texts.tokens).tolist() == [[0, 0, 0, 0], [1, 1, 1, 1]]
