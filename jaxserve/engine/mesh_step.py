"""Steps on a mesh: each device runs the step of its part of the model, under one `shard_map`.

Nothing is left to the partitioner: which bytes devices exchange, and in which order sums are
added, is written in the step, and custom calls such as attention kernels see local arrays.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from jaxserve.engine.mask_loads import MaskLoadLayout, load_masks
from jaxserve.engine.slots import SlotLoadLayout, SlotState, load_slot
from jaxserve.engine.step import Params, make_step
from jaxserve.engine.step_inputs import StepLayout
from models.ops.attention.kv_pool import KV_POOL_AXES
from models.ops.attention.registry import AttentionImplementation
from models.sharding import ModelSharding


def make_mesh_step(
    sharding: ModelSharding,
    layout: StepLayout,
    attention: AttentionImplementation,
    params: Params,
) -> Callable[..., Any]:
    """The step of one bucket for D replicas of T devices each.

    Its arguments: params; kv_pool `[L, D * (P + 1), ...]`; slots of D * S; inputs int32
    `[D, 1, layout.size]`. Its last result is int32 `[D, N, 3 + 2 * num_top]`, whole on every
    device.

    Args:
        sharding: of the model.
        layout: of one replica.
        attention: gets one device's heads.
        params: abstract.
    """
    local_step = make_step(sharding.local_config, layout, attention, sharding.shard)

    def step(
        params: Params, kv_pool: jax.Array, slots: SlotState, inputs: jax.Array
    ) -> tuple[jax.Array, SlotState, jax.Array]:
        kv_pool, slots, outputs = local_step(params, kv_pool, slots, inputs.reshape(layout.size))
        return kv_pool, slots, lax.all_gather(outputs, "data")

    pool, slots = sharding.spec(KV_POOL_AXES), sharding.spec(("slots",))
    return jax.shard_map(
        step,
        mesh=sharding.mesh,
        in_specs=(sharding.param_specs(params), pool, slots, sharding.spec(("replicas", "plans"))),
        out_specs=(pool, slots, sharding.spec(())),
        # What is whole on several devices is computed alike on each, which jax cannot prove.
        check_vma=False,
    )


def make_mesh_load_slot(sharding: ModelSharding, layout: SlotLoadLayout) -> Callable[..., Any]:
    """`load_slot` of every replica: slots of D * S and int32 `[D, layout.size]` to slots.

    A replica that loads nothing gets a vector for slot S, which is dropped.
    """

    def load(slots: SlotState, vectors: jax.Array) -> SlotState:
        return load_slot(slots, vectors[0], layout=layout)

    slots = sharding.spec(("slots",))
    return jax.shard_map(
        load,
        mesh=sharding.mesh,
        in_specs=(slots, sharding.spec(("replicas",))),
        out_specs=slots,
        check_vma=False,
    )


def make_mesh_load_masks(sharding: ModelSharding, layout: MaskLoadLayout) -> Callable[..., Any]:
    """`load_masks` of every replica: masks of D * S slots and int32 `[D, layout.size]` to masks."""

    def load(allowed_mask: jax.Array, vectors: jax.Array) -> jax.Array:
        return load_masks(allowed_mask, vectors[0], layout=layout)

    slots = sharding.spec(("slots",))
    return jax.shard_map(
        load,
        mesh=sharding.mesh,
        in_specs=(slots, sharding.spec(("replicas",))),
        out_specs=slots,
        check_vma=False,
    )
