"""The arrays that steps keep on the device, before there are any and when there are.

Warm-up and serving compile and allocate from these alone, so that shapes and shardings agree.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Sharding, SingleDeviceSharding

from jaxserve.engine.settings import EngineSettings
from jaxserve.engine.slots import SlotState, slot_state_shapes
from models.ops.attention.kv_pool import KV_POOL_AXES, kv_pool_shape
from models.ops.native import untouched
from models.sharding import ModelSharding


@dataclass(frozen=True, slots=True)
class StepArrays:
    """What a `StepDevice` owns beside the weights, as `jax.ShapeDtypeStruct` or as arrays."""

    kv_pool: Any
    slots: SlotState
    between_stages: Any
    """In a pipeline, the rows that each stage has got from the one before: `[D, P, T, E]` for T
    rows of the largest bucket. None without stages."""
    adapters: Any
    """The pool of adapters (`models.adapter_pool`), None without room for any. Steps read it."""


def abstract_arrays(settings: EngineSettings) -> StepArrays:
    """Shapes, dtypes and, on a mesh, shardings."""
    scheduler, sharding = settings.scheduler, settings.sharding
    dtype = settings.pool_dtype
    if sharding is None:
        config = settings.model_config
        pool = kv_pool_shape(config, scheduler.num_pages, scheduler.page_size, dtype)
        return StepArrays(
            jax.ShapeDtypeStruct(pool, dtype),
            slot_state_shapes(scheduler.max_num_seqs, config.vocab_size),
            None,
            settings.abstract_adapters(),
        )
    config, num_replicas = sharding.served_config, sharding.shape.data
    num_layers, num_pages, *rest = kv_pool_shape(
        config, scheduler.num_pages, scheduler.page_size, dtype
    )
    slots = slot_state_shapes(num_replicas * scheduler.max_num_seqs, config.vocab_size)
    return StepArrays(
        jax.ShapeDtypeStruct(
            (num_layers, num_replicas * num_pages, *rest),
            dtype,
            sharding=sharding.named(*KV_POOL_AXES),
        ),
        jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                leaf.shape, leaf.dtype, sharding=sharding.named("slots")
            ),
            slots,
        ),
        None if sharding.shape.stage == 1 else _between_stages(settings, sharding),
        settings.abstract_adapters(),
    )


def _between_stages(settings: EngineSettings, sharding: ModelSharding) -> jax.ShapeDtypeStruct:
    shape = sharding.shape
    rows = (settings.scheduler.buckets[-1], settings.model_config.hidden_size)
    return jax.ShapeDtypeStruct(
        (shape.data, shape.stage, *rows),
        settings.dtype,
        sharding=sharding.named("replicas", "plans"),
    )


def allocate(settings: EngineSettings) -> StepArrays:
    """The KV pool, the slots and the pool of adapters, as `fresh` makes them."""
    default = SingleDeviceSharding(settings.device)
    return fresh(abstract_arrays(settings), default, is_native=settings.native is not None)


def fresh(abstract: StepArrays, default: Sharding, *, is_native: bool) -> StepArrays:
    """Arrays of zeros; but the KV pool of native kernels holds anything.

    Attention reads no token that has not been written, so what a pool holds at first makes no
    difference. Zeros of a large one take a CPU seconds to write.

    Args:
        abstract: their shapes.
        default: where those go that name no sharding.
        is_native: whether native kernels run the steps.
    """
    wanted = (abstract.kv_pool, abstract.slots, abstract.between_stages, abstract.adapters)
    leaves, structure = jax.tree.flatten((None, *wanted[1:]) if is_native else wanted)
    make = _maker_of_zeros(
        tuple((leaf.shape, leaf.dtype) for leaf in leaves),
        tuple(leaf.sharding or default for leaf in leaves),
    )
    pool, *others = jax.tree.unflatten(structure, make())
    if is_native:
        pool = untouched(abstract.kv_pool.shape, abstract.kv_pool.dtype)
    jax.block_until_ready((pool, others))
    return StepArrays(pool, *others)


@functools.cache  # What was made once is made again without a compilation.
def _maker_of_zeros(
    kinds: tuple[tuple[tuple[int, ...], Any], ...], shardings: tuple[Sharding, ...]
) -> Callable[[], list[jax.Array]]:
    """One program for all arrays: one for each costs a start 30 ms an array."""
    return jax.jit(
        lambda: [jnp.zeros(shape, dtype) for shape, dtype in kinds],
        out_shardings=list(shardings),
    )
