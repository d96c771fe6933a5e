"""Windows stay within the budget, and cutting tensors changes no bit."""

from __future__ import annotations

from pathlib import Path

import pytest
from rig import TINY, convert

from checkpoint.migrate.compute import compute_window
from checkpoint.migrate.parts import PartSource
from checkpoint.migrate.plan import Plan, PlannedArray
from checkpoint.store.direct_file import buffer_at
from jaxserve.errors import ConfigError
from jaxserve.migration.convert import plan_conversion
from jaxserve.migration.request import ConversionRequest
from tools.migration_speed.conversion import Conversion, measure_conversion
from tools.migration_speed.synthetic import write_synthetic


@pytest.mark.parametrize(
    ("variant", "to"),
    [
        pytest.param(variant, to, marks=() if variant == "mqa" else pytest.mark.long)
        for variant in ("mqa", "biases", "llama2_mha", "head_dim")
        for to in ("orbax", "safetensors", "gguf", "back", "from_gguf")
    ],
)
def test_cut_tensors_come_to_the_same(
    variant: str, to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows, columns, heads: every way of cutting, down to the smallest pieces."""
    source = TINY / variant
    if to == "back":
        convert(source, tmp_path / "own", "orbax")
        source, to = tmp_path / "own", "gguf"
    elif to == "from_gguf":
        convert(source, tmp_path / "s.gguf", "gguf")
        source, to = tmp_path / "s.gguf", "orbax"
    target = tmp_path / ("t.gguf" if to == "gguf" else "t")
    monkeypatch.setattr("checkpoint.migrate.parts.BLOCK_BYTES", 200)
    with plan_conversion(
        source, ConversionRequest(target, to), num_workers=1, memory_bytes=None
    ) as conversion:
        arrays, parts = conversion.migration.plan.arrays, conversion.migration.source
        num_cut = 0
        for array in arrays:
            whole, num_whole = made_in_windows(array, parts, 1 << 40)
            for window_bytes in (600, 1):
                cut, num_windows = made_in_windows(array, parts, window_bytes)
                assert cut == whole, array.name
                num_cut += num_windows > num_whole
        assert num_cut > 5


def made_in_windows(
    array: PlannedArray, source: PartSource, window_bytes: int
) -> tuple[bytes, int]:
    plan = Plan((array,), {}, (), window_bytes)
    made = [
        compute_window(window, source, buffer_at(0, window.num_bytes)).tobytes()
        for window in plan.windows(source)
    ]
    return b"".join(made), len(made)


@pytest.mark.long
@pytest.mark.parametrize("to", ["orbax", "safetensors", "gguf"])
def test_a_model_larger_than_the_budget_is_converted_within_it(to: str, tmp_path: Path) -> None:
    num_bytes = write_synthetic(tmp_path / "hf", 600_000_000, 200_000_000)
    target = tmp_path / ("t.gguf" if to == "gguf" else "t")
    budget = 400_000_000
    found = measure_conversion(
        Conversion("safetensors", to),
        *(tmp_path / "hf", target, num_bytes),
        memory_budget=str(budget),
    )
    assert num_bytes > 1.4 * budget
    assert found.peak_bytes <= 1.1 * budget, found


def test_a_budget_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    request = ConversionRequest(tmp_path / "own", "orbax")
    with (
        pytest.raises(ConfigError, match="the program alone takes"),
        plan_conversion(TINY / "mqa", request, num_workers=1, memory_bytes=1 << 20),
    ):
        pass
