"""GgufFile: every supported tensor type against a decoder written from the format."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
import pytest

from checkpoint.formats import gguf_blocks
from checkpoint.formats.gguf import GgufFile
from checkpoint.formats.gguf_header import SUPPORTED_TYPES

TYPES = gguf.GGMLQuantizationType


def half(raw: bytes) -> float:
    return float(struct.unpack("<e", raw)[0])


def decode_q4_0(block: bytes) -> list[float]:
    scale, quants = half(block[:2]), block[2:]
    return [scale * ((q & 15) - 8) for q in quants] + [scale * ((q >> 4) - 8) for q in quants]


def decode_q4_1(block: bytes) -> list[float]:
    scale, low, quants = half(block[:2]), half(block[2:4]), block[4:]
    return [scale * (q & 15) + low for q in quants] + [scale * (q >> 4) + low for q in quants]


def fifth_bits(block: bytes, at: int) -> list[int]:
    (bits,) = struct.unpack("<I", block[at : at + 4])
    return [(bits >> i & 1) << 4 for i in range(32)]


def decode_q5_0(block: bytes) -> list[float]:
    scale, high, quants = half(block[:2]), fifth_bits(block, 2), block[6:]
    nibbles = [q & 15 for q in quants] + [q >> 4 for q in quants]
    return [scale * ((q | h) - 16) for q, h in zip(nibbles, high, strict=True)]


def decode_q5_1(block: bytes) -> list[float]:
    scale, low = half(block[:2]), half(block[2:4])
    high, quants = fifth_bits(block, 4), block[8:]
    nibbles = [q & 15 for q in quants] + [q >> 4 for q in quants]
    return [scale * (q | h) + low for q, h in zip(nibbles, high, strict=True)]


def decode_q8_0(block: bytes) -> list[float]:
    scale = half(block[:2])
    return [scale * q for q in struct.unpack("<32b", block[2:])]


def six_bit_pairs(packed: bytes) -> list[tuple[int, int]]:
    """Scale and minimum of the 8 sub-blocks of a Q4_K or Q5_K block, out of 12 bytes."""
    pairs = [(packed[i] & 63, packed[i + 4] & 63) for i in range(4)]
    for i in range(4):
        scale = (packed[i + 8] & 15) | (packed[i] >> 6) << 4
        low = (packed[i + 8] >> 4) | (packed[i + 4] >> 6) << 4
        pairs.append((scale, low))
    return pairs


def decode_q4_k(block: bytes) -> list[float]:
    scale, low, pairs = half(block[:2]), half(block[2:4]), six_bit_pairs(block[4:16])
    values = []
    for i, (sub_scale, sub_low) in enumerate(pairs):
        quants = block[16 + i // 2 * 32 : 16 + i // 2 * 32 + 32]
        nibbles = [q >> 4 if i % 2 else q & 15 for q in quants]
        values += [scale * sub_scale * q - low * sub_low for q in nibbles]
    return values


def decode_q5_k(block: bytes) -> list[float]:
    scale, low, pairs = half(block[:2]), half(block[2:4]), six_bit_pairs(block[4:16])
    high = block[16:48]
    values = []
    for i, (sub_scale, sub_low) in enumerate(pairs):
        quants = block[48 + i // 2 * 32 : 48 + i // 2 * 32 + 32]
        for j, q in enumerate(quants):
            whole = (q >> 4 if i % 2 else q & 15) | (high[j] >> i & 1) << 4
            values.append(scale * sub_scale * whole - low * sub_low)
    return values


def decode_q6_k(block: bytes) -> list[float]:
    low_bits, high_bits = block[:128], block[128:192]
    scales, scale = struct.unpack("<16b", block[192:208]), half(block[208:210])
    values = []
    for i in range(256):
        part, within = divmod(i, 128)
        quarter, column = divmod(within, 32)
        low = low_bits[part * 64 + column + (quarter % 2) * 32]
        low = low >> 4 if quarter >= 2 else low & 15
        high = high_bits[part * 32 + column] >> (2 * quarter) & 3
        values.append(scale * scales[i // 16] * ((low | high << 4) - 32))
    return values


DECODERS: dict[TYPES, tuple[int, list[int], Callable[[bytes], list[float]]]] = {
    # type: bytes of a block, where its half-precision numbers are, decoder
    TYPES.Q4_0: (18, [0], decode_q4_0),
    TYPES.Q4_1: (20, [0, 2], decode_q4_1),
    TYPES.Q5_0: (22, [0], decode_q5_0),
    TYPES.Q5_1: (24, [0, 2], decode_q5_1),
    TYPES.Q8_0: (34, [0], decode_q8_0),
    TYPES.Q4_K: (144, [0, 2], decode_q4_k),
    TYPES.Q5_K: (176, [0, 2], decode_q5_k),
    TYPES.Q6_K: (210, [208], decode_q6_k),
}


def write(path: Path, tensors: dict[str, tuple[np.ndarray, TYPES]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_supported_type_is_tested_here() -> None:
    tested = {*DECODERS, TYPES.F32, TYPES.F16, TYPES.BF16}
    assert tested == SUPPORTED_TYPES


@pytest.mark.parametrize("kind", DECODERS, ids=lambda kind: kind.name)
def test_random_blocks_decode_as_the_format_says(kind: TYPES, tmp_path: Path) -> None:
    block_bytes, halves, decode = DECODERS[kind]
    rng = np.random.default_rng(int(kind))
    num_rows, blocks_per_row = 5, 3
    raw = rng.integers(0, 256, (num_rows, blocks_per_row, block_bytes), np.uint8)
    for at in halves:
        scales = rng.uniform(-2, 2, (num_rows, blocks_per_row)).astype("<f2")
        raw[:, :, at : at + 2] = scales[..., None].view(np.uint8)
    path = write(tmp_path / "a.gguf", {"w": (raw.reshape(num_rows, -1), kind)})
    file = GgufFile(path)
    expected = np.array([[v for b in row for v in decode(b.tobytes())] for row in raw])
    values = file.read("w")
    assert values.dtype == np.float32
    assert file.info("w").shape == values.shape == expected.shape
    assert file.info("w").dtype == kind.name
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "levels"),
    [(TYPES.Q4_0, 8), (TYPES.Q4_1, 15), (TYPES.Q5_0, 16), (TYPES.Q5_1, 31), (TYPES.Q8_0, 127)],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_quantised_values_come_back_near(kind: TYPES, levels: int, tmp_path: Path) -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (7, 96)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {"w": (gguf.quants.quantize(weight, kind), kind)})
    assert np.abs(GgufFile(path).read("w") - weight).max() <= 1.02 * 2 / levels


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [(TYPES.F32, np.float32), (TYPES.F16, np.float16), (TYPES.BF16, ml_dtypes.bfloat16)],
    ids=["F32", "F16", "BF16"],
)
def test_plain_types_keep_dtype_bits_and_shape(
    kind: TYPES, dtype: type[np.generic], tmp_path: Path
) -> None:
    weight = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(dtype)
    stored = weight.view(np.uint8) if kind == TYPES.BF16 else weight
    file = GgufFile(write(tmp_path / "a.gguf", {"w": (stored, kind)}))
    values = file.read("w")
    assert values.dtype == dtype
    assert file.info("w").dtype == np.dtype(dtype).name
    assert values.shape == (2, 3, 5, 4)
    assert values.tobytes() == weight.tobytes()
    assert not values.flags.writeable


def test_decoding_in_parts_gives_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).uniform(-1, 1, (37, 64)).astype(np.float32)
    path = write(tmp_path / "a.gguf", {"w": (gguf.quants.quantize(weight, TYPES.Q8_0), TYPES.Q8_0)})
    whole = GgufFile(path).read("w")
    monkeypatch.setattr(gguf_blocks, "ELEMENTS_AT_A_TIME", 64 * 5)
    np.testing.assert_array_equal(GgufFile(path).read("w"), whole)


def test_stored_bytes_add_up(tmp_path: Path) -> None:
    weight = np.ones((4, 64), np.float32)
    quantised = gguf.quants.quantize(weight, TYPES.Q4_0)
    path = write(tmp_path / "a.gguf", {"w": (quantised, TYPES.Q4_0), "v": (weight, TYPES.F32)})
    file = GgufFile(path)
    assert [file.num_stored_bytes(name) for name in file.names()] == [4 * 2 * 18, 4 * 64 * 4]
