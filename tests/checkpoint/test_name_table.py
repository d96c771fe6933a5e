"""The transforms undo themselves and do what the file conventions say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from checkpoint.name_table import IDENTITY, TRANSPOSE, TensorRule, chain, unpermute_rope


@given(
    num_heads=st.integers(1, 5),
    half=st.integers(1, 4),
    num_columns=st.integers(1, 3),
    kind=st.sampled_from(["identity", "transpose", "unpermute", "chained"]),
)
def test_a_transform_undoes_itself(num_heads: int, half: int, num_columns: int, kind: str) -> None:
    transform = {
        "identity": IDENTITY,
        "transpose": TRANSPOSE,
        "unpermute": unpermute_rope(num_heads),
        "chained": chain(unpermute_rope(num_heads), TRANSPOSE),
    }[kind]
    rows = num_heads * half * 2
    array = np.arange(rows * num_columns, dtype=np.float32).reshape(rows, num_columns)
    leaf = transform.to_leaf(array)
    assert transform.file_shape(leaf.shape) == array.shape
    np.testing.assert_array_equal(transform.to_file(leaf), array)


@pytest.mark.parametrize("shape", [(2 * 6,), (2 * 6, 3)])
def test_unpermute_moves_neighbouring_pairs_to_the_two_halves(shape: tuple[int, ...]) -> None:
    half_split = np.arange(np.prod(shape)).reshape(shape)
    first_head, second_head = np.split(half_split, 2)
    pairs_order = [0, 3, 1, 4, 2, 5]
    in_file = np.concatenate((first_head[pairs_order], second_head[pairs_order]))
    np.testing.assert_array_equal(unpermute_rope(2).to_leaf(in_file), half_split)


def test_a_rule_with_layer_fills_a_stacked_leaf() -> None:
    rule = TensorRule("blk.{layer}.attn_norm.weight", "layers.attention_norm.scale")
    assert rule.is_stacked
    assert list(rule.parts((2, 5))) == [
        ("blk.0.attn_norm.weight", (0,)),
        ("blk.1.attn_norm.weight", (1,)),
    ]
    assert not TensorRule("output_norm.weight", "final_norm").is_stacked
