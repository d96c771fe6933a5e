"""Chunks that are plain files are read in place, any part of them, as TensorStore reads them."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from checkpoint.store.array_files import ArrayFiles, Chunk
from checkpoint.store.chunk_files import ChunkFiles
from checkpoint.store.orbax_io import ArrayReader

SHAPE, CHUNK_SHAPE = (2, 7, 10), (1, 3, 10)


def write(folder: Path, dtype: object = np.float32) -> np.ndarray:
    """Three chunks a layer, the last of them filled up."""
    values = np.arange(140).reshape(SHAPE).astype(dtype)  # type: ignore[arg-type]
    files = ArrayFiles(folder)
    for layer in range(2):
        for row in range(3):
            piece = values[layer : layer + 1, 3 * row : 3 * row + 3]
            files.write(Chunk("params/w", SHAPE, CHUNK_SHAPE, (layer, row, 0), piece))
    return values


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.int8])
def test_any_part_is_what_tensorstore_reads(dtype: object, tmp_path: Path) -> None:
    values = write(tmp_path, dtype)
    reader = ArrayReader(tmp_path)
    random = np.random.default_rng(0)
    assert ChunkFiles.open(tmp_path / "params.w") is not None
    for _ in range(60):
        bounds = [sorted(random.choice(size + 1, 2, replace=False)) for size in SHAPE]
        part = tuple(slice(int(start), int(stop)) for start, stop in bounds)
        found = np.zeros_like(values[part])
        reader.read_into("params/w", part, found)
        np.testing.assert_array_equal(found, values[part])
        np.testing.assert_array_equal(reader.read_part("params/w", part), values[part])
        # Memory whose rows do not lie one behind the other.
        turned = np.zeros(values[part].shape[::-1], values.dtype).T
        reader.read_into("params/w", part, turned)
        np.testing.assert_array_equal(turned, values[part])


@pytest.mark.parametrize("change", [{"compressor": {"id": "zstd"}}, {"order": "F"}])
def test_other_ways_of_storing_are_left_to_tensorstore(change: dict, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "params.w" / ".zarray"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert ChunkFiles.open(tmp_path / "params.w") is None


@pytest.mark.parametrize("damage", ["short", "long", "missing", "link"])
def test_a_chunk_that_is_not_whole_is_an_error(damage: str, tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "params.w" / "1.2.0"
    match damage:
        case "short":
            path.write_bytes(path.read_bytes()[:-1])
        case "long":
            path.write_bytes(path.read_bytes() + b"x")
        case "missing":
            path.unlink()
        case "link":
            path.rename(tmp_path / "elsewhere")
            path.symlink_to(tmp_path / "elsewhere")
    whole = tuple(slice(0, size) for size in SHAPE)
    with pytest.raises((ValueError, OSError)):
        ArrayReader(tmp_path).read_into("params/w", whole, np.zeros(SHAPE, np.float32))
