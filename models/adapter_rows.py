"""The adapters of a pool (`models.adapter_pool`) inside a step: which row gets which, and where."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from checkpoint.param_loading import flatten
from models.layers import FUSED_PROJECTIONS
from models.ops.linear import Linear
from models.ops.row_adapters import AdapterRows, RowAdapters, StackedAdapters

AdapterPool = dict[str, Any]
"""See `models.adapter_pool`."""


def pool_rows(pool: AdapterPool, adapter_of_row: jax.Array) -> AdapterRows:
    """What rows with these adapters, int32 `[T]`, need in every layer; 0 is none."""
    *_, num_adapters, max_rank = next(
        leaf.shape for path, leaf in flatten(pool).items() if path.endswith(".a")
    )
    return AdapterRows.of(adapter_of_row, num_adapters, max_rank)


def attach_row_adapters(module: nnx.Module, layer_pool: AdapterPool, rows: AdapterRows) -> None:
    """Give `module`'s projections those of the pool.

    Args:
        module: a layer of its own, for example one that was merged inside a scan's body. It may
            hold projections side by side that the pool has apart (`models.gpu_layout`).
        layer_pool: one layer of the pool.
        rows: which adapter each row gets.
    """
    left = set(layer_pool)
    for name, child in vars(module).items():
        if isinstance(child, Linear):
            sources = (name,) if name in layer_pool else FUSED_PROJECTIONS.get(name, ())
            if sources and left.issuperset(sources):
                parts = [layer_pool[source] for source in sources]
                stacked = tuple(StackedAdapters(part["a"], part["b"]) for part in parts)
                child.row_adapters = RowAdapters(stacked, rows)
                left -= set(sources)
        elif isinstance(child, nnx.Module) and name in layer_pool:
            attach_row_adapters(child, layer_pool[name], rows)
            left.discard(name)
    if left:
        raise ValueError(f"{type(module).__name__} has no projections {', '.join(sorted(left))}")
