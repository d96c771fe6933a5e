"""Files that lie: each broken rule is a clean error that costs next to no memory."""

from __future__ import annotations

import os
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoint.errors import FormatError
from checkpoint.formats.gguf import GgufFile
from checkpoint.formats.gguf_header import MAX_ARRAY_LENGTH, parse_header
from tests.checkpoint.gguf_files import (
    BOOL,
    F32,
    INT32,
    Q4_0,
    Q8_0,
    STRING,
    UINT8,
    UINT32,
    GgufBytes,
    array,
    key,
    tensor,
    text,
)

HUGE = 1 << 63


def one_key(raw: bytes) -> GgufBytes:
    return GgufBytes(keys=[raw])


def one_tensor(raw: bytes) -> GgufBytes:
    return GgufBytes(tensors=[raw])


def alignment(value: int) -> GgufBytes:
    return one_key(key("general.alignment", UINT32, struct.pack("<I", value)))


LIES = {
    "magic": (GgufBytes(magic=b"GGML"), "does not start with"),
    "pickle": (GgufBytes(magic=b"\x80\x04\x95\x00"), "does not start with"),
    "zip": (GgufBytes(magic=b"PK\x03\x04"), "does not start with"),
    "version 1": (GgufBytes(version=1), "version 1"),
    "version 4": (GgufBytes(version=4), "version 4"),
    "big-endian": (GgufBytes(version=3 << 24), "big-endian"),
    "key count": (GgufBytes(num_keys=HUGE), "key count"),
    "tensor count": (GgufBytes(num_tensors=HUGE), "tensor count"),
    "one key too many": (GgufBytes(num_keys=4), "GGUF"),
    "key length": (one_key(struct.pack("<Q", HUGE)), "metadata key"),
    "key not UTF-8": (one_key(key(b"\xff\xfe", UINT32, bytes(4))), "UTF-8"),
    "duplicate key": (GgufBytes(keys=[key("k", UINT32, bytes(4))] * 2), "twice"),
    "value type": (one_key(key("k", 13, bytes(8))), "unknown value type 13"),
    "boolean": (one_key(key("k", BOOL, b"\x02")), "boolean"),
    "string length": (one_key(key("k", STRING, struct.pack("<Q", HUGE))), "cannot fit"),
    "string not UTF-8": (one_key(key("k", STRING, text(b"\xc3\x28"))), "UTF-8"),
    "string above 1 MiB": (
        one_key(key("k", STRING, text("x" * ((1 << 20) + 1)))),
        "above the limit",
    ),
    "array length": (one_key(array("k", UINT32, HUGE, b"")), "cannot fit"),
    "string array length": (one_key(array("k", STRING, 1 << 40, b"")), "cannot fit"),
    "array item type": (one_key(array("k", 77, 1, bytes(64))), "unknown item type"),
    "array of arrays": (one_key(array("k", 9, 1, bytes(64))), "array of arrays"),
    "string in array": (one_key(array("k", STRING, 1, struct.pack("<Q", HUGE))), "cannot fit"),
    "alignment 0": (alignment(0), "power of two"),
    "alignment 24": (alignment(24), "power of two"),
    "alignment 2^31": (alignment(1 << 31), "power of two"),
    "alignment of a string": (
        one_key(key("general.alignment", STRING, text("32"))),
        "power of two",
    ),
    "no dimensions": (one_tensor(tensor("a", [], F32, 0)), "0 dimensions"),
    "5 dimensions": (one_tensor(tensor("a", [1] * 5, F32, 0)), "5 dimensions"),
    "2^32 dimensions": (
        one_tensor(text("a") + struct.pack("<I", 2**32 - 1) + bytes(64)),
        "4294967295 dimensions",
    ),
    "zero dimension": (one_tensor(tensor("a", [4, 0], F32, 0)), "impossible"),
    "dimension product": (one_tensor(tensor("a", [1 << 32, 1 << 32], F32, 0)), "impossible"),
    "product that wraps to 0": (one_tensor(tensor("a", [HUGE, 2], F32, 0)), "impossible"),
    "tensor type": (one_tensor(tensor("a", [4], 99, 0)), "unknown type number 99"),
    "removed tensor type": (one_tensor(tensor("a", [4], 4, 0)), "unknown type number 4"),
    "unsupported type": (one_tensor(tensor("a", [256], 16, 0)), "IQ2_XXS, which is not supported"),
    "broken block": (one_tensor(tensor("a", [33], Q4_0, 0)), "not a multiple of the 32"),
    "past the end": (one_tensor(tensor("a", [32], F32, 0)), "cut short"),
    "offset past the end": (one_tensor(tensor("a", [4], F32, 1 << 62)), "cut short"),
    "offset that wraps": (one_tensor(tensor("a", [4], F32, 2**64 - 32)), "cut short"),
    "offset off alignment": (one_tensor(tensor("a", [4], F32, 4)), "alignment"),
    "duplicate tensor": (GgufBytes(tensors=[tensor("a", [4], F32, 0)] * 2), "twice"),
    "overlap": (
        GgufBytes(tensors=[tensor("a", [10], F32, 0), tensor("b", [4], F32, 32)]),
        "overlap",
    ),
    "same place": (
        GgufBytes(tensors=[tensor("a", [4], F32, 0), tensor("b", [4], F32, 0)]),
        "overlap",
    ),
    "tensor name not UTF-8": (
        one_tensor(text(b"\xff") + struct.pack("<IQIQ", 1, 4, F32, 0)),
        "UTF-8",
    ),
}


@pytest.mark.parametrize(("file", "message"), LIES.values(), ids=LIES.keys())
def test_lie_is_a_clean_error(file: GgufBytes, message: str, tmp_path: Path) -> None:
    path = file.write(tmp_path / "lie.gguf")
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match=message):
            GgufFile(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


def test_honest_file_is_read(tmp_path: Path) -> None:
    file = GgufFile(GgufBytes().write(tmp_path / "a.gguf"))
    assert file.metadata == {"general.name": "x"}
    assert list(file.names()) == ["a", "b"]
    assert file.info("a").shape == (2, 4)
    assert file.info("b").dtype == "Q8_0"
    assert file.read("a").tobytes() == bytes(range(32))
    assert not file.read("b").any()
    with pytest.raises(KeyError, match="no tensor 'c'"):
        file.read("c")


def test_version_2_and_other_alignment(tmp_path: Path) -> None:
    keys = [key("general.alignment", UINT32, struct.pack("<I", 64))]
    tensors = [tensor("a", [4], F32, 0), tensor("b", [32], Q8_0, 64)]
    data = bytes(64) + b"\x00\x3c" + bytes(range(32))  # scale 1.0
    honest = GgufBytes(version=2, keys=keys, tensors=tensors, data=data, alignment=64)
    file = GgufFile(honest.write(tmp_path / "a.gguf"))
    assert file.read("b").tolist() == list(range(32))


def test_every_truncation_is_a_clean_error(tmp_path: Path) -> None:
    keys = [
        key("s", STRING, text("abc")),
        array("i", INT32, 2, bytes(8)),
        array("t", STRING, 1, text("z")),
    ]
    whole = GgufBytes(keys=keys).write(tmp_path / "a.gguf").read_bytes()
    parse_header(memoryview(whole))
    for length in range(len(whole)):
        with pytest.raises(FormatError):
            parse_header(memoryview(whole)[:length])


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_bytes_never_crash(data: st.DataObject) -> None:
    whole = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(whole) - 1))
        whole[position] = data.draw(st.sampled_from([0, 1, 8, 9, 127, 128, 255]))
    try:
        header = parse_header(memoryview(bytes(whole)))
    except FormatError:
        return
    for entry in header.tensors.values():
        assert 0 < entry.offset <= entry.offset + entry.num_bytes <= len(whole)


def _whole() -> bytes:
    keys = [
        key("s", STRING, text("abc")),
        array("u", UINT8, 5, bytes(5)),
        array("t", STRING, 2, text("z") + text("yy")),
    ]
    tensors = [tensor("a", [4, 2], F32, 0), tensor("b", [32], Q8_0, 32)]
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 3) + b"".join(keys) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(66)


WHOLE = _whole()


def test_sparse_terabyte_claims_nothing(tmp_path: Path) -> None:
    """A hole of 1 TiB makes any count fit in the file; the limits still hold."""
    path = one_key(array("k", UINT8, MAX_ARRAY_LENGTH + 1, b"")).write(tmp_path / "a.gguf")
    os.truncate(path, 1 << 40)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError, match="above the limit"):
            GgufFile(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_things_that_are_not_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "empty").touch()
    for name in ("fifo", "empty", "."):
        with pytest.raises(FormatError):
            GgufFile(tmp_path / name)
    with pytest.raises(FormatError, match="not a regular file"):
        GgufFile("/dev/zero")
    with pytest.raises(FileNotFoundError):
        GgufFile(tmp_path / "missing")
