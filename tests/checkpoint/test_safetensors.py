"""SafetensorsFolder reads what the safetensors library writes, and refuses broken files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from checkpoint.errors import FormatError
from checkpoint.formats.safetensors import SafetensorsFile, SafetensorsFolder

F32 = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(folder: Path, header: Any, data: bytes, name: str = "model.safetensors") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (folder / name).write_bytes(len(text).to_bytes(8, "little") + text + data)
    return folder


def write_index(folder: Path, weight_map: dict[str, str]) -> Path:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.int64])
def test_reads_what_the_library_writes(tmp_path: Path, dtype: type) -> None:
    stored = {
        "matrix": np.arange(6).reshape(2, 3).astype(dtype),
        "vector": np.arange(5).astype(dtype),
        "scalar": np.array(7).astype(dtype),
        "empty": np.zeros((0, 3), dtype),
    }
    save_file(stored, tmp_path / "model.safetensors", {"format": "np"})
    source = SafetensorsFolder(tmp_path)
    assert sorted(source.names()) == sorted(stored)
    for name, values in stored.items():
        assert source.info(name).shape == values.shape
        assert source.info(name).dtype == values.dtype.name
        read = source.read(name)
        assert read.dtype == values.dtype
        np.testing.assert_array_equal(read, values)


def test_reads_shards_through_the_index(tmp_path: Path) -> None:
    save_file({"a": np.float32([1])}, tmp_path / "one.safetensors")
    save_file({"b": np.float32([2])}, tmp_path / "two.safetensors")
    write_index(tmp_path, {"a": "one.safetensors", "b": "two.safetensors"})
    source = SafetensorsFolder(tmp_path)
    assert sorted(source.names()) == ["a", "b"]
    assert source.read("b")[0] == 2


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not valid JSON"),
        (b"[1]", b"", "not a JSON object"),
        (b"[" * 100_000, b"", "not valid JSON"),
        (b'{"a": {}, "a": {}}', b"", "a key appears twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', b"", "a key appears twice"),
        ({"a": 3}, b"", "must hold dtype, shape and data_offsets"),
        ({"a": F32 | {"more": 1}}, bytes(8), "must hold dtype, shape and data_offsets"),
        ({"a": F32 | {"dtype": "F8_E4M3"}}, bytes(8), "dtype 'F8_E4M3' is not supported"),
        ({"a": F32 | {"shape": [-2]}}, bytes(8), "is not a list of sizes"),
        ({"a": F32 | {"shape": [True, 2]}}, bytes(8), "is not a list of sizes"),
        ({"a": F32 | {"shape": [1] * 17}}, bytes(8), "is not a list of sizes"),
        ({"a": F32 | {"shape": [2.0]}}, bytes(8), "is not a list of sizes"),
        ({"a": F32 | {"shape": [3]}}, bytes(8), "is 12 bytes, not 8"),
        ({"a": F32 | {"shape": [2**40, 2**40]}}, bytes(8), "not 8"),
        ({"a": F32 | {"data_offsets": [8, 0]}}, bytes(8), "is not a begin and an end"),
        ({"a": F32 | {"data_offsets": [0]}}, bytes(8), "is not a begin and an end"),
        ({"a": F32}, bytes(4), "is the download whole"),
        ({"a": F32}, bytes(12), "is the download whole"),
        ({"a": F32 | {"data_offsets": [4, 12]}}, bytes(12), "leaves a hole"),
        ({"a": F32, "b": F32}, bytes(8), "overlaps another"),
        ({"a": F32, "b": F32 | {"data_offsets": [12, 20]}}, bytes(20), "leaves a hole"),
        ({"a": F32, "b": F32 | {"data_offsets": [4, 12]}}, bytes(12), "overlaps another"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        SafetensorsFolder(write_raw(tmp_path, header, data))


@pytest.mark.parametrize("length", [2**63, 200_000_000, 17])
def test_a_header_longer_than_the_file_is_refused(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(FormatError, match="is the download whole"):
        SafetensorsFolder(tmp_path)


def test_a_file_without_a_length_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"1234567")
    with pytest.raises(FormatError, match="too short"):
        SafetensorsFolder(tmp_path)


@settings(max_examples=60, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_file_is_an_error_or_has_valid_tensors(
    tmp_path_factory: pytest.TempPathFactory, position: int, value: int, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    save_file({"a": np.float32([1, 2]), "b": np.zeros((2, 3), np.float16)}, folder / "m")
    content = bytearray((folder / "m").read_bytes())
    content[position % len(content)] = value
    (folder / "m").write_bytes(content[: len(content) - (cut if cut < 20 else 0)])
    try:
        file = SafetensorsFile(folder / "m")
    except FormatError:
        return
    for name in file.names():
        assert file.read(name).shape == file.info(name).shape


@pytest.mark.parametrize(
    "shard", ["../outside.safetensors", "/etc/passwd", "sub/one.safetensors", "..", "", "a\\b"]
)
def test_a_shard_name_must_be_a_plain_file_name(tmp_path: Path, shard: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.float32([1])}, tmp_path / "outside.safetensors")
    with pytest.raises(FormatError, match="must be a plain file name"):
        SafetensorsFolder(write_index(folder, {"a": shard}))


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({"a": np.float32([1])}, tmp_path / "outside.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "outside.safetensors")
    with pytest.raises(FormatError, match="leads out of"):
        SafetensorsFolder(folder)


def test_the_links_of_a_hugging_face_cache_are_followed(tmp_path: Path) -> None:
    folder = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs = tmp_path / "models--x--y" / "blobs"
    folder.mkdir(parents=True)
    blobs.mkdir()
    save_file({"a": np.float32([1])}, blobs / "123")
    (folder / "model.safetensors").symlink_to("../../blobs/123")
    assert SafetensorsFolder(folder).read("a")[0] == 1


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "one.safetensors", "c": "one.safetensors"}, "'c': the file .* lacks it"),
        ({}, "weight_map must map"),
        ({"a": "gone.safetensors"}, "gone.safetensors is missing"),
        ({"a": 3}, "weight_map must map"),
    ],
)
def test_an_index_must_agree_with_its_shards(
    tmp_path: Path, weight_map: dict[str, Any], message: str
) -> None:
    save_file({"a": np.float32([1])}, tmp_path / "one.safetensors")
    with pytest.raises(FormatError, match=message):
        SafetensorsFolder(write_index(tmp_path, weight_map))


def test_a_tensor_that_the_index_does_not_announce_is_refused(tmp_path: Path) -> None:
    save_file({"a": np.float32([1]), "b": np.float32([2])}, tmp_path / "one.safetensors")
    with pytest.raises(FormatError, match=r"'b': the file .* holds it unannounced"):
        SafetensorsFolder(write_index(tmp_path, {"a": "one.safetensors"}))


def test_a_folder_of_pickles_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(FormatError, match=r"pytorch_model\.bin, a pickle.*safetensors"):
        SafetensorsFolder(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=r"holds neither model\.safetensors nor"):
        SafetensorsFolder(tmp_path)
