"""The table of shardings: every family's parameters are in it, and what cannot be divided is
refused. Steps on real meshes are in `tests/step/test_meshes.py`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from checkpoint.param_loading import flatten
from models.config import ModelConfig
from models.loading import open_model
from models.mesh_shape import MESH_AXES, MeshError, MeshShape, parse_mesh
from models.ops.linear import SPLIT_BY_INPUT
from models.ops.quantized import dequantize
from models.quantization import quantize_params, quantized_shapes
from models.registry import FAMILIES, get_family
from models.sharding import ModelSharding, check_quantized, leaf_axes

TINY = Path(__file__).parent.parent / "goldens" / "tiny"
VARIANTS = sorted(path.parent.name for path in TINY.glob("*/logits.npz"))
CONFIG = ModelConfig(
    family="llama",
    vocab_size=97,
    hidden_size=64,
    intermediate_size=128,
    num_layers=6,
    num_heads=8,
    num_kv_heads=2,
    head_dim=8,
    max_position_embeddings=64,
)


def sharding_of(config: ModelConfig, **sizes: int) -> ModelSharding:
    shape = MeshShape(**sizes)
    mesh: Any = AbstractMesh(tuple(shape.sizes().values()), MESH_AXES)
    return ModelSharding(config, shape, mesh)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_familys_parameters_are_divided_evenly(variant: str) -> None:
    config = open_model(TINY / variant).config
    size = 2 if config.num_heads % 2 == 0 and config.num_experts % 2 == 0 else 1
    sharding = sharding_of(config, stage=2, tensor=size)
    whole = get_family(config.family).abstract_params(config, jnp.float32)
    for path, leaf in flatten(sharding.abstract_params(whole)).items():
        held = leaf.sharding.shard_shape(leaf.shape)
        parts = np.prod(leaf.shape) / np.prod(held)
        if path.startswith("layers.") and path.endswith(".kernel") and "router" not in path:
            assert parts == 2 * size, path
        elif path in ("embed", "lm_head"):
            assert parts == size, path


def test_the_goldens_have_every_family() -> None:
    assert {open_model(TINY / variant).config.family for variant in VARIANTS} == set(FAMILIES)


def test_partial_sums_are_where_the_inputs_are_divided() -> None:
    split = {
        name
        for name in ("q_proj", "k_proj", "qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        if leaf_axes(f"layers.x.{name}.kernel", 3)[1] != "width"
    }
    assert split == set(SPLIT_BY_INPUT)


def test_a_parameter_that_is_not_in_the_table_is_an_error() -> None:
    with pytest.raises(KeyError, match=r"layers\.attention\.new_proj\.kernel"):
        leaf_axes("layers.attention.new_proj.kernel", 3)


def test_more_devices_than_kv_heads_keep_copies() -> None:
    sharding = sharding_of(CONFIG, tensor=8)
    assert sharding.served_config.num_kv_heads == 8
    assert (sharding.local_config.num_heads, sharding.local_config.num_kv_heads) == (1, 1)
    order = sharding._arrangement("kv_heads", 16)
    assert order is not None
    # Query heads 0 .. 3 use the first head, 4 .. 7 the second.
    heads = order.reshape(8, 8)
    assert (heads[:4] == np.arange(8)).all()
    assert (heads[4:] == np.arange(8, 16)).all()


def test_fused_projections_are_divided_by_heads() -> None:
    sharding = sharding_of(replace(CONFIG, num_kv_heads=4, head_dim=1), tensor=2)
    order = sharding._arrangement("qkv", 8 + 4 + 4)
    assert order is not None
    assert order.tolist() == [0, 1, 2, 3, 8, 9, 12, 13, 4, 5, 6, 7, 10, 11, 14, 15]
    halves = sharding._arrangement("gate_up", 8)
    assert halves is not None
    assert halves.tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("sizes", "config", "message"),
    [
        ({"stage": 4}, CONFIG, "6 layers; choose one of 1, 2, 3, 6"),
        ({"tensor": 3}, CONFIG, "8 query heads; choose one of 1, 2, 4, 8"),
        ({"tensor": 8}, replace(CONFIG, intermediate_size=100), "100 feed-forward columns"),
        ({"tensor": 4}, replace(CONFIG, num_kv_heads=6, num_heads=12), "6 KV heads"),
        ({"tensor": 4}, replace(CONFIG, num_experts=6), "6 experts; choose one of 1, 2, 3, 6"),
    ],
)
def test_what_cannot_be_divided_is_refused_with_the_choices(
    sizes: dict[str, int], config: ModelConfig, message: str
) -> None:
    with pytest.raises(MeshError, match=message):
        sharding_of(config, **sizes)


def test_int4_needs_whole_groups_on_each_device() -> None:
    check_quantized(CONFIG, MeshShape(tensor=2), "int4")
    with pytest.raises(MeshError, match=r"16 inputs of\s+o_proj"):
        check_quantized(CONFIG, MeshShape(tensor=4), "int4")


def test_a_part_of_int4_codes_stands_for_that_part_of_the_kernel() -> None:
    kernel = np.random.default_rng(0).normal(size=(2, 128, 8)).astype(np.float32)
    whole = quantize_params(_one_kernel(kernel), "int4", _keep)
    parts = quantize_params(_one_kernel(kernel), "int4", _keep, lambda _: 2)
    for half in range(2):
        codes = np.split(_leaf(parts, "layers.mlp.down_proj.kernel")[0], 2)[half]
        scales = np.split(_leaf(parts, "kernel_scales.mlp.down_proj.scale")[0], 2)[half]
        wanted = dequantize(
            jnp.asarray(_leaf(whole, "layers.mlp.down_proj.kernel")[0]),
            jnp.asarray(_leaf(whole, "kernel_scales.mlp.down_proj.scale")[0]),
        )
        found = dequantize(jnp.asarray(codes), jnp.asarray(scales))
        np.testing.assert_array_equal(found, np.split(np.asarray(wanted), 2)[half])


@pytest.mark.parametrize("weight_format", ["int8", "int4"])
def test_quantised_parameters_are_in_the_table(weight_format: str) -> None:
    whole = get_family("llama").abstract_params(CONFIG, jnp.float32)
    placed = sharding_of(CONFIG, tensor=2).abstract_params(quantized_shapes(whole, weight_format))
    codes = flatten(placed)["layers.attention.q_proj.kernel"]
    scales = flatten(placed)["kernel_scales.attention.q_proj.scale"]
    for leaf in (codes, scales):
        assert leaf.sharding.shard_shape(leaf.shape)[-1] == leaf.shape[-1] // 2


def test_meshes_are_parsed() -> None:
    assert parse_mesh("tensor=4, data=2") == MeshShape(data=2, tensor=4)
    assert parse_mesh(str(MeshShape(stage=3))) == MeshShape(stage=3)
    assert MeshShape(data=2, stage=2, tensor=2).num_devices == 8


@pytest.mark.parametrize("text", ["", "4", "tensor", "tensor=x", "expert=2", "tensor=0"])
def test_what_is_no_mesh_is_refused(text: str) -> None:
    with pytest.raises(MeshError):
        parse_mesh(text)


def test_an_axis_is_named_once() -> None:
    with pytest.raises(MeshError, match="names tensor twice"):
        parse_mesh("tensor=2,tensor=4")


def _one_kernel(kernel: np.ndarray) -> dict[str, Any]:
    return {"layers": {"mlp": {"down_proj": {"kernel": kernel}}}}


def _keep(path: str, host: np.ndarray) -> Any:
    del path
    return host


def _leaf(params: dict[str, Any], path: str) -> np.ndarray:
    leaf: np.ndarray = flatten(params)[path]
    return leaf
