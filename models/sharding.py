"""The one table that says how a model and its serving state lie on a mesh.

Every array's axes have logical names. `MESH_AXIS_OF` gives the mesh axis that each is divided
over; loading, the abstract arrays that programs are compiled for, warm-up and serving all read it.
Layers are divided as in Megatron-LM (Shoeybi et al., 2019, section 3): the first projection of a
branch by columns, the second by rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checkpoint.param_loading import flatten, unflatten
from models.config import ModelConfig
from models.decoder import Params
from models.mesh_shape import MESH_AXES, MeshError, MeshShape
from models.ops.linear import SPLIT_BY_INPUT
from models.ops.quantized import INT4_GROUP
from models.ops.tensor_shard import TensorShard

MESH_AXIS_OF = {
    "layers": "stage",
    "heads": "tensor",
    "kv_heads": "tensor",
    "qkv": "tensor",
    "mlp": "tensor",
    "gate_up": "tensor",
    "experts": "tensor",
    "vocab": "tensor",
    "pages": "data",
    "slots": "data",
    "replicas": "data",
    "plans": "stage",
}
"""Logical axis -> mesh axis. What is not named is whole on every device."""

_TOP_LEVEL = {
    "embed": ("vocab", "width"),
    "lm_head": ("width", "vocab"),
    "position_embed": ("positions", "width"),
}
_PROJECTIONS = {
    "q_proj": ("width", "heads"),
    "k_proj": ("width", "kv_heads"),
    "v_proj": ("width", "kv_heads"),
    "qkv_proj": ("width", "qkv"),
    "o_proj": ("heads", "width"),
    "gate_proj": ("width", "mlp"),
    "up_proj": ("width", "mlp"),
    "gate_up_proj": ("width", "gate_up"),
    "down_proj": ("mlp", "width"),
    "router": ("width", "scores"),
}
"""Projection -> the logical axes of its inputs and outputs."""

_NORMS = ("scale", "bias")


def leaf_axes(path: str, num_axes: int) -> tuple[str, ...]:
    """The logical axes of a parameter, quantised or not.

    Args:
        path: its place in the family's pytree, joined by dots.
        num_axes: of the array.

    Raises:
        KeyError: a leaf that the table does not know.
    """
    if path in _TOP_LEVEL:
        return _TOP_LEVEL[path]
    if path.startswith("final_norm."):
        return ("width",)
    *_, module, leaf = path.split(".")
    if module in _PROJECTIONS:
        inputs, outputs = _PROJECTIONS[module]
        if leaf == "a":  # This and `b`: see `models.adapter_pool`.
            return ("layers", inputs, "adapters", "ranks")
        if leaf == "b":
            return ("layers", "adapters", "ranks", outputs)
        if leaf == "bias" or num_axes == 2:  # Of each output, as int8's scales are.
            return ("layers", outputs)
        if num_axes == 4:  # One matrix for each expert, which is whole on its device.
            return ("layers", "experts", "expert_inputs", "expert_outputs")
        return ("layers", inputs, outputs)
    if leaf in _NORMS and num_axes == 2:
        return ("layers", "normalised")
    raise KeyError(f"models.sharding has no axes for the parameter {path}")


@dataclass(frozen=True)
class ModelSharding:
    """How one model lies on one mesh.

    Raises:
        MeshError: the mesh divides something that cannot be divided so.
    """

    config: ModelConfig
    """Of the whole model."""
    shape: MeshShape
    mesh: Mesh

    def __post_init__(self) -> None:
        _check(self.config, self.shape)

    @property
    def shard(self) -> TensorShard | None:
        """What the devices of the tensor axis exchange; None if there is one."""
        size = self.shape.tensor
        return TensorShard("tensor", size) if size > 1 else None

    @property
    def num_local_layers(self) -> int:
        """Layers of a stage."""
        return self.config.num_layers // self.shape.stage

    @cached_property
    def served_config(self) -> ModelConfig:
        """The model as its arrays lie on the mesh: with a KV head for each device at least.

        If there are fewer, each is kept T / K times, beside the query heads that use it.
        """
        return replace(self.config, num_kv_heads=max(self.config.num_kv_heads, self.shape.tensor))

    @cached_property
    def local_config(self) -> ModelConfig:
        """The shape of one device's part of a layer. Vocabulary, layers and experts are counted
        as in the whole model."""
        size, whole = self.shape.tensor, self.served_config
        is_mixture = whole.num_experts > 0
        return replace(
            whole,
            num_heads=whole.num_heads // size,
            num_kv_heads=whole.num_kv_heads // size,
            intermediate_size=whole.intermediate_size // (1 if is_mixture else size),
        )

    def spec(self, axes: Sequence[str | None]) -> PartitionSpec:
        """Which mesh axes an array of these logical axes is divided over."""
        return PartitionSpec(*(MESH_AXIS_OF.get(axis) if axis else None for axis in axes))

    def named(self, *axes: str | None) -> NamedSharding:
        """The sharding of an array of these logical axes."""
        return NamedSharding(self.mesh, self.spec(axes))

    def param_specs(self, params: Params) -> Params:
        """The `PartitionSpec` of each leaf of (abstract) parameters."""
        return unflatten(
            {path: self.spec(leaf_axes(path, leaf.ndim)) for path, leaf in flatten(params).items()}
        )

    def abstract_params(self, params: Params) -> Params:
        """Abstract parameters as they lie on the mesh.

        Args:
            params: `jax.ShapeDtypeStruct` of the whole model, quantised or not.
        """
        placed = {}
        for path, leaf in flatten(params).items():
            axes = leaf_axes(path, leaf.ndim)
            shape = tuple(
                self._arranged_size(axis, size) for axis, size in zip(axes, leaf.shape, strict=True)
            )
            placed[path] = jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=self.named(*axes))
        return unflatten(placed)

    def place(self, path: str, host: npt.NDArray[Any]) -> jax.Array:
        """A `checkpoint.param_loading.Place`: each device gets its part of the leaf and no more."""
        axes = leaf_axes(path, host.ndim)
        arrangements = [
            self._arrangement(axis, size) for axis, size in zip(axes, host.shape, strict=True)
        ]
        shape = tuple(
            size if order is None else len(order)
            for order, size in zip(arrangements, host.shape, strict=True)
        )

        def part(index: tuple[slice, ...] | None) -> npt.NDArray[Any]:
            assert index is not None
            held = host[
                tuple(
                    piece if order is None else slice(None)
                    for order, piece in zip(arrangements, index, strict=True)
                )
            ]
            for axis, order in enumerate(arrangements):
                if order is not None:
                    held = _take(held, order[index[axis]], axis)
            return held

        return jax.make_array_from_callback(shape, self.named(*axes), part)

    def num_input_parts(self, path: str) -> int:
        """How many devices share the inputs of the projection whose kernel `path` is."""
        return self.shape.tensor if path.split(".")[-2] in SPLIT_BY_INPUT else 1

    def _arranged_size(self, axis: str, size: int) -> int:
        order = self._arrangement(axis, size)
        return size if order is None else len(order)

    def _arrangement(self, axis: str, size: int) -> npt.NDArray[np.int64] | None:
        """Which entry of the file's axis is where on the mesh's, -1 for padding; None if as is."""
        num_parts, config = self.shape.tensor, self.config
        if num_parts == 1:
            return None
        entries = np.arange(size)
        if axis == "vocab":
            return np.pad(entries, (0, -size % num_parts), constant_values=-1)
        if axis == "gate_up":
            return _side_by_side(np.split(entries, 2), num_parts)
        if axis == "kv_heads":
            return self._copy_kv_heads(entries)
        if axis == "qkv":
            queries = config.num_heads * config.head_dim
            keys = queries + config.num_kv_heads * config.head_dim
            q, k, v = np.split(entries, [queries, keys])
            return _side_by_side([q, self._copy_kv_heads(k), self._copy_kv_heads(v)], num_parts)
        return None

    def _copy_kv_heads(self, entries: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        config = self.config
        heads = entries.reshape(config.num_kv_heads, config.head_dim)
        num_copies = self.served_config.num_kv_heads // config.num_kv_heads
        return np.repeat(heads, num_copies, axis=0).ravel()


def make_sharding(
    config: ModelConfig, shape: MeshShape, devices: Sequence[jax.Device]
) -> ModelSharding:
    """The model on the first devices of `devices`.

    Raises:
        MeshError: too few devices, or the model cannot be divided so.
    """
    if shape.num_devices > len(devices):
        raise MeshError(
            f"--mesh {shape} needs {shape.num_devices} devices, and there are {len(devices)}: "
            "choose a smaller mesh, or --virtual-devices on a CPU"
        )
    grid = np.asarray(devices[: shape.num_devices], dtype=object)
    return ModelSharding(config, shape, Mesh(grid.reshape(*shape.sizes().values()), MESH_AXES))


def check_quantized(config: ModelConfig, shape: MeshShape, weight_format: str) -> None:
    """Raises MeshError unless each device's inputs are whole groups of the format."""
    if weight_format != "int4":
        return
    sizes = {"o_proj": config.num_heads * config.head_dim, "down_proj": config.intermediate_size}
    for name, size in sizes.items():
        if size // shape.tensor % INT4_GROUP:
            raise MeshError(
                f"--mesh tensor={shape.tensor} gives each device {size // shape.tensor} inputs of "
                f"{name}, and int4 needs whole groups of {INT4_GROUP}: choose int8, or a smaller "
                "tensor"
            )


def _check(config: ModelConfig, shape: MeshShape) -> None:
    _check_divides("stage", shape.stage, "layers", config.num_layers)
    size = shape.tensor
    _check_divides("tensor", size, "query heads", config.num_heads)
    if config.num_experts:
        _check_divides("tensor", size, "experts", config.num_experts)
    else:
        _check_divides("tensor", size, "feed-forward columns", config.intermediate_size)
    num_kv_heads = config.num_kv_heads
    if size % num_kv_heads and num_kv_heads % size:
        choices = [
            n for n in _divisors(config.num_heads) if not (n % num_kv_heads and num_kv_heads % n)
        ]
        raise MeshError(
            f"--mesh tensor={size} does not fit the model's {num_kv_heads} KV heads: it must "
            "divide their number, or be a multiple of it (each is then kept by several devices); "
            f"choose one of {', '.join(map(str, choices))}"
        )


def _check_divides(axis: str, size: int, name: str, count: int) -> None:
    if count % size:
        choices = ", ".join(map(str, _divisors(count)))
        raise MeshError(
            f"--mesh {axis}={size} does not divide the model's {count} {name}; choose one of "
            f"{choices}"
        )


def _divisors(count: int) -> list[int]:
    return [number for number in range(1, count + 1) if count % number == 0]


def _side_by_side(blocks: Sequence[npt.NDArray[np.int64]], num_parts: int) -> npt.NDArray[np.int64]:
    """The first part of every block, then the second of every block, and so on."""
    parts = [np.split(block, num_parts) for block in blocks]
    return np.concatenate([piece for part in zip(*parts, strict=True) for piece in part])


def _take(host: npt.NDArray[Any], entries: npt.NDArray[np.int64], axis: int) -> npt.NDArray[Any]:
    """Entries of one axis; zeros for -1."""
    taken = host.take(np.maximum(entries, 0), axis=axis)
    if (entries < 0).any():
        taken[(slice(None),) * axis + (entries < 0,)] = 0
    return taken
