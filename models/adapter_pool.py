"""AdapterPool: room for N adapters of at most R ranks beside a model's weights.

The pool is a pytree nested like the parameters of the layers, with
`{"a": [L, in, N, R], "b": [L, N, R, out]}` where those have a projection's kernel: every projection
that an adapter may have. Its shape never changes; an adapter is written into one of its places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import numpy as np
import numpy.typing as npt
from jax import lax
from jax.typing import DTypeLike

from checkpoint.errors import FormatError
from checkpoint.param_loading import Place, flatten, unflatten
from models.config import ModelConfig
from models.lora_peft import PeftAdapter, adapted_projections
from models.registry import get_family

AdapterPool: TypeAlias = dict[str, Any]
"""As drawn above; `AdapterPool` of one place is what is written."""

_LAYERS = "layers."


def pool_shapes(
    config: ModelConfig, dtype: DTypeLike, num_adapters: int, max_rank: int
) -> AdapterPool:
    """The pool as `jax.ShapeDtypeStruct`.

    Raises:
        FormatError: no projection of such a model can have adapters.
    """
    kernels = flatten(get_family(config.family).abstract_params(config, dtype))
    leaves: dict[str, jax.ShapeDtypeStruct] = {}
    for path in adapted_projections(config):
        num_layers, num_in, num_out = kernels[f"{path}.kernel"].shape
        name = path.removeprefix(_LAYERS)
        shape = (num_layers, num_in, num_adapters, max_rank)
        leaves[f"{name}.a"] = jax.ShapeDtypeStruct(shape, dtype)
        shape = (num_layers, num_adapters, max_rank, num_out)
        leaves[f"{name}.b"] = jax.ShapeDtypeStruct(shape, dtype)
    if not leaves:
        raise FormatError(
            f"no projection of a {config.family} model can have adapters beside it: merge them "
            "into its weights (jaxserve checkpoint convert)"
        )
    return unflatten(leaves)


def one_place(adapter: PeftAdapter, place_shapes: AdapterPool) -> dict[str, npt.NDArray[Any]]:
    """An adapter as what is written into a place of the pool.

    The scale is multiplied into `b` in float32; each number is rounded once.

    Args:
        adapter: of the model that the pool is of.
        place_shapes: `pool_shapes` of one adapter.

    Returns:
        Path of each leaf to its value on the host; zeros where the adapter has nothing.

    Raises:
        FormatError: it has more ranks than there is room for, or numbers that are not finite.
    """
    max_rank = next(
        shape.shape[-1] for path, shape in flatten(place_shapes).items() if path.endswith(".a")
    )
    if adapter.rank > max_rank:
        raise FormatError(
            f"the adapter has {adapter.rank} ranks, and there is room for {max_rank}: start with "
            f"--max-lora-rank {adapter.rank}"
        )
    leaves: dict[str, npt.NDArray[Any]] = {}
    for path, shape in flatten(place_shapes).items():
        room = np.zeros(shape.shape, shape.dtype)
        values = adapter.leaves.get(f"{_LAYERS}{path}")
        if values is not None:
            if path.endswith(".a"):
                room[:, :, 0, : adapter.rank] = values
            else:
                with np.errstate(over="ignore"):  # It is found below.
                    scaled = values.astype(np.float32) * np.float32(adapter.scale)
                room[:, 0, : adapter.rank] = scaled
            if not np.isfinite(room.astype(np.float32)).all():
                raise FormatError(f"the adapter's {path} holds NaN or infinity")
        leaves[path] = room
    return leaves


def place_leaves(leaves: Mapping[str, npt.NDArray[Any]], place: Place) -> AdapterPool:
    """What `one_place` gave, on the device or the mesh."""
    return unflatten({path: place(path, leaf) for path, leaf in leaves.items()})


def write_place(pool: AdapterPool, adapter: AdapterPool, index: jax.Array) -> AdapterPool:
    """The pool with an adapter of one place at `index`, int32, counted from 0. It is donated."""
    written = {}
    new = flatten(adapter)
    for path, leaf in flatten(pool).items():
        axis = 2 if path.endswith(".a") else 1
        written[path] = lax.dynamic_update_slice_in_dim(leaf, new[path], index, axis)
    return unflatten(written)
