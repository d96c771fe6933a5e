"""The gradient of one micro-batch, as one program for one device.

Never partitioned: XLA gives other bits to a program that is split over devices, or that is
fused with what comes after it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxserve.errors import ConfigError
from jaxserve.trainer.data.rows import Rows
from jaxserve.trainer.flat_vector import FlatVector, Leaf
from jaxserve.trainer.step_config import DecayedLeaves, FloatDtype, Remat
from models.config import ModelConfig
from models.lora import Lora, LoraConfig, init_adapters
from models.registry import get_family
from models.training import TrainRows, loss_sum

Tree: TypeAlias = dict[str, Any]

ROW_FIELDS = ("inputs", "targets", "weights", "segment_ids", "positions")
WEIGHTS = ROW_FIELDS.index("weights")
STACKED = "layers"
"""Leaves below this key have a leading axis of layers."""


@dataclass(frozen=True, kw_only=True)
class GradientSpec:
    """What the program is compiled for.

    Attributes:
        model: the model's config.
        flat: the vector that the gradient is laid out in.
        compute_dtype, param_dtype, dropout, remat: see `StepConfig`.
        rng_seed: root of the dropout's random numbers.
        lora: if given, its adapters are what is trained.
    """

    model: ModelConfig
    flat: FlatVector
    compute_dtype: FloatDtype
    param_dtype: FloatDtype
    dropout: float
    remat: Remat
    rng_seed: int
    lora: LoraConfig | None = None


def flat_vector_of(abstract_params: Tree, decayed: DecayedLeaves) -> FlatVector:
    """The vector of a model's parameters.

    Args:
        abstract_params: nested dict of anything with a `shape`.
        decayed: "matrices": leaves of two or more axes, not counting that of stacked layers.
    """
    leaves = []
    for name, leaf in named_leaves(abstract_params).items():
        shape = tuple(int(size) for size in leaf.shape)
        num_axes = len(shape) - name.startswith(f"{STACKED}/")
        leaves.append(Leaf(name, shape, decayed == "all" or num_axes >= 2))
    return FlatVector.of(leaves)


def named_leaves(tree: Tree, prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested dict by their path with slashes, in jax's order (sorted keys)."""
    leaves: dict[str, Any] = {}
    for key in sorted(tree):
        value = tree[key]
        if isinstance(value, dict):
            leaves |= named_leaves(value, f"{prefix}{key}/")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves


def nested(leaves: Mapping[str, Any]) -> Tree:
    """The inverse of `named_leaves`."""
    root: Tree = {}
    for name, leaf in leaves.items():
        node = root
        *parents, last = name.split("/")
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return root


def flatten(flat: FlatVector, tree: Tree) -> jax.Array:
    """A tree of arrays as float32[num_blocks, block_size], padded with zeros."""
    leaves = named_leaves(tree)
    parts = [leaves[leaf.name].reshape(-1).astype(jnp.float32) for leaf in flat.leaves]
    padding = flat.num_blocks * flat.block_size - flat.num_values
    parts.append(jnp.zeros((padding,), jnp.float32))
    return jnp.concatenate(parts).reshape(flat.num_blocks, flat.block_size)


@partial(jax.jit, static_argnums=(0, 1))
def unflatten(flat: FlatVector, dtype: FloatDtype, vector: jax.Array) -> Tree:
    """A vector `[at least num_blocks, block_size]` as the model's tree, in `dtype`."""
    values = vector.reshape(-1)
    leaves = {}
    for leaf in flat.leaves:
        first = flat.offsets[leaf.name]
        part = jax.lax.slice_in_dim(values, first, first + leaf.size)
        leaves[leaf.name] = part.reshape(leaf.shape).astype(dtype)
    return nested(leaves)


def pack_rows(rows: Rows, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """A micro-batch of b examples as one array to move: int32[b, 5 T + 1], ids last."""
    if len(ids) and int(ids.max()) >= 2**31:
        raise ConfigError(f"example id {int(ids.max())}: a data set may hold at most 2**31 of them")
    fields = [getattr(rows, name) for name in ROW_FIELDS]
    return np.concatenate([*fields, ids[:, None]], axis=1, dtype=np.int32, casting="unsafe")


def _unpack(packed: jax.Array) -> tuple[TrainRows, jax.Array]:
    size = (packed.shape[1] - 1) // len(ROW_FIELDS)
    fields = {
        name: packed[:, place * size : (place + 1) * size] for place, name in enumerate(ROW_FIELDS)
    }
    fields["weights"] = fields["weights"].astype(jnp.float32)
    return TrainRows(**fields), packed[:, -1]


@partial(jax.jit, static_argnums=0)
def shard_gradient(
    spec: GradientSpec,
    params: Tree,
    base: Tree | None,
    packed: jax.Array,
    step: jax.Array,
    num_tokens: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The gradient of a micro-batch's share in the mean loss of the global batch.

    Args:
        spec: what to compile for.
        params: what is trained, in `param_dtype`: the model's tree, or adapters.
        base: with adapters the model's tree, which stays as it is.
        packed: see `pack_rows`.
        step: int32[].
        num_tokens: float32[], targets of the global batch that count, at least 1.

    Returns:
        The gradient, float32[num_blocks, block_size], and the share itself, float32[1].
    """
    rows, ids = _unpack(packed)
    keys = _example_keys(spec.rng_seed, step, ids) if spec.dropout else None

    def loss_of(tree: Tree) -> jax.Array:
        model_params, lora = _model_and_lora(spec, tree, base)
        total = loss_sum(
            model_params,
            spec.model,
            rows,
            lora=lora,
            keys=keys,
            dropout=spec.dropout,
            remat=spec.remat,
            compute_dtype=jnp.dtype(spec.compute_dtype),
        )
        return total / num_tokens

    loss, gradient = jax.value_and_grad(loss_of)(params)
    return flatten(spec.flat, gradient), loss[None]


@partial(jax.jit, static_argnums=0)
def shard_loss(
    spec: GradientSpec,
    params: Tree,
    base: Tree | None,
    packed: jax.Array,
    num_tokens: jax.Array,
) -> jax.Array:
    """A micro-batch's share in the mean loss without dropout, float32[1]. As `shard_gradient`."""
    rows, _ = _unpack(packed)
    model_params, lora = _model_and_lora(spec, params, base)
    total = loss_sum(
        model_params,
        spec.model,
        rows,
        lora=lora,
        compute_dtype=jnp.dtype(spec.compute_dtype),
    )
    return (total / num_tokens)[None]


def _example_keys(rng_seed: int, step: jax.Array, ids: jax.Array) -> jax.Array:
    """Key of an example: a function of (seed, step, example id) alone."""
    step_key = jax.random.fold_in(jax.random.key(rng_seed), step)
    return jax.vmap(partial(jax.random.fold_in, step_key))(ids.astype(jnp.uint32))


def _model_and_lora(
    spec: GradientSpec, params: Tree, base: Tree | None
) -> tuple[Tree, Lora | None]:
    if spec.lora is None:
        return params, None
    assert base is not None
    return base, Lora(params, spec.lora.scale)


def init_trainable(model: ModelConfig, lora: LoraConfig | None, rng_seed: int) -> Tree:
    """Fresh float32 parameters, or adapters: a function of the seed."""
    family, key = get_family(model.family), jax.random.key(rng_seed)
    if lora is None:
        return family.init_params(model, key, jnp.float32)
    return init_adapters(family.abstract_params(model, jnp.float32), lora, key)


def abstract_trainable(model: ModelConfig, lora: LoraConfig | None) -> Tree:
    """The tree of `init_trainable` as shapes."""
    tree: Tree = jax.eval_shape(lambda: init_trainable(model, lora, 0))
    return tree
