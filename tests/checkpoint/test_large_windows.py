"""Windows that are made piece by piece hold what they would hold made at once."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from safetensors.numpy import save_file

from checkpoint.formats.safetensors import SafetensorsFolder
from checkpoint.migrate.compute import PIECE_BYTES, compute_window
from checkpoint.migrate.errors import MigrationError
from checkpoint.migrate.parts import FileParts
from checkpoint.migrate.plan import PlannedArray, PlannedPart, Window
from checkpoint.name_table import IDENTITY, TRANSPOSE, Transform, chain, unpermute_rope

SHAPE = (1030, 768)
NUM_HEADS = 103
NAME = "weight"


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    made = np.random.default_rng(0).normal(0, 0.02, SHAPE).astype(np.float32)
    assert made.nbytes > 3 * PIECE_BYTES
    return made


@pytest.fixture(scope="module")
def source(values: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FileParts]:
    folder = tmp_path_factory.mktemp("source")
    too_large = values.copy()
    too_large[900, 5] = 1e6
    save_file({NAME: values, "too_large": too_large}, folder / "model.safetensors")
    parts = FileParts(SafetensorsFolder(folder).location)
    yield parts
    parts.close()


def made(source: FileParts, dtype: str, rows: slice, to_file: Transform, name: str = NAME):
    """Rows of the array in `dtype`, and their values or bytes."""
    part = PlannedPart(name, (), SHAPE, to_leaf=TRANSPOSE, to_file=to_file)
    window = Window(PlannedArray(name, SHAPE, dtype, (part,)), 0, rows.start, rows.stop)
    return compute_window(window, source, np.zeros(window.num_bytes, np.uint8))


@pytest.mark.parametrize("rows", [slice(0, 1030), slice(10, 1000)])
@pytest.mark.parametrize("heads", [None, NUM_HEADS])
def test_windows_of_many_pieces(
    rows: slice, heads: int | None, values: np.ndarray, source: FileParts
) -> None:
    permute = IDENTITY if heads is None else unpermute_rope(heads)
    wanted = permute.to_file(values)[rows]
    to_file = chain(permute, TRANSPOSE)
    halves = made(source, "float16", rows, to_file)
    np.testing.assert_array_equal(halves, wanted.astype(np.float16))
    blocks = made(source, "Q8_0", rows, to_file)
    np.testing.assert_array_equal(blocks, quantize(wanted, GGMLQuantizationType.Q8_0).reshape(-1))


def test_a_value_too_large_in_a_late_piece_is_refused(source: FileParts) -> None:
    with pytest.raises(MigrationError, match=r"too_large holds values up to 1e\+06"):
        made(source, "float16", slice(0, 1030), TRANSPOSE, "too_large")
