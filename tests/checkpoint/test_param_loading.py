"""load_params and export_tensors are inverse, and every misfit is named in one error."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from checkpoint.errors import FormatError
from checkpoint.name_table import TRANSPOSE, NameTable, TensorRule, chain, unpermute_rope
from checkpoint.param_loading import export_tensors, flatten, load_params, unflatten
from tests.checkpoint.memory_source import MemorySource

TABLE = NameTable(
    rules=(
        TensorRule("emb", "embed"),
        TensorRule("l.{layer}.q", "layers.q.kernel", chain(unpermute_rope(2), TRANSPOSE)),
        TensorRule("l.{layer}.n", "layers.norm"),
    ),
    ignored=(r"l\.\d+\.freqs",),
    copies={"head": "emb"},
)
SHAPES = {"embed": (5, 3), "layers.q.kernel": (4, 3, 8), "layers.norm": (4, 3)}


def abstract(dtype: type) -> dict:
    return unflatten({path: jax.ShapeDtypeStruct(s, dtype) for path, s in SHAPES.items()})


def tensors() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = {"emb": (5, 3)}
    for layer in range(4):
        shapes |= {f"l.{layer}.q": (8, 3), f"l.{layer}.n": (3,)}
    return {name: generator.normal(size=s).astype(np.float32) for name, s in shapes.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_round_trip_is_bit_exact(dtype: type) -> None:
    stored = {name: values.astype(dtype) for name, values in tensors().items()}
    params = load_params(MemorySource(stored), TABLE, abstract(dtype))
    exported = dict(export_tensors(params, TABLE))
    assert exported.keys() == stored.keys()
    for name, values in exported.items():
        assert values.dtype == stored[name].dtype
        assert values.tobytes() == stored[name].tobytes(), name


def test_layers_are_stacked_in_their_order_and_cast() -> None:
    stored = tensors()
    params = load_params(MemorySource(stored), TABLE, abstract(jnp.bfloat16))
    for layer in range(4):
        expected = stored[f"l.{layer}.n"].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(np.asarray(params["layers"]["norm"][layer]), expected)


def test_progress_counts_bytes_of_the_parameters_up_to_the_total() -> None:
    calls: list[tuple[int, int]] = []
    load_params(
        MemorySource(tensors()),
        TABLE,
        abstract(jnp.bfloat16),
        progress=lambda done, total: calls.append((done, total)),
    )
    total = 2 * (5 * 3 + 4 * 3 * 8 + 4 * 3)
    done = [call[0] for call in calls]
    assert {call[1] for call in calls} == {total}
    assert done == sorted(done)
    assert done[-1] == total
    assert len(calls) == len(tensors())


def test_leaves_go_through_place_in_their_final_shape_and_dtype() -> None:
    placed: dict[str, tuple[tuple[int, ...], str]] = {}

    def place(path: str, array: np.ndarray) -> np.ndarray:
        placed[path] = array.shape, array.dtype.name
        return array

    params = load_params(MemorySource(tensors()), TABLE, abstract(jnp.bfloat16), place=place)
    assert placed == {path: (shape, "bfloat16") for path, shape in SHAPES.items()}
    assert isinstance(params["embed"], np.ndarray)


def test_all_misfits_are_named_in_one_error() -> None:
    stored = tensors()
    del stored["l.1.n"]
    stored["l.9.q"] = stored["l.0.q"]
    stored["l.2.q"] = stored["l.2.q"].T
    stored["l.3.n"] = np.zeros(3, np.int32)
    stored["l.3.freqs"] = np.zeros(3, np.float32)
    with pytest.raises(FormatError) as error:
        load_params(MemorySource(stored), TABLE, abstract(jnp.float32))
    message = str(error.value)
    assert "missing: l.1.n" in message
    assert "unexpected: l.9.q" in message
    assert "wrong shape: l.2.q is (3, 8), the config needs (8, 3)" in message
    assert "wrong dtype: l.3.n is int32" in message
    assert "freqs" not in message


def test_a_long_list_of_misfits_is_cut() -> None:
    stored = tensors() | {f"stray.{index:03}": np.zeros(1, np.float32) for index in range(50)}
    with pytest.raises(FormatError, match=r"stray\.019\n.*and 30 more"):
        load_params(MemorySource(stored), TABLE, abstract(jnp.float32))


def test_a_tied_head_may_be_written_out_but_must_be_the_embedding() -> None:
    stored = tensors()
    stored["head"] = stored["emb"].copy()
    load_params(MemorySource(stored), TABLE, abstract(jnp.float32))
    stored["head"][2, 1] += 1
    with pytest.raises(FormatError, match="not tied: head differs from emb"):
        load_params(MemorySource(stored), TABLE, abstract(jnp.float32))


def test_flatten_and_unflatten_are_inverse() -> None:
    tree = {"a": 1, "b": {"c": 2, "d": {"e": 3}}}
    assert flatten(tree) == {"a": 1, "b.c": 2, "b.d.e": 3}
    assert unflatten(flatten(tree)) == tree
