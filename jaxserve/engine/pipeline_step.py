"""The tick: one program in which every stage of a pipeline computes its layers of another plan."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine.slots import SlotState
from jaxserve.engine.step import Params, adapter_of_row, draw, input_tokens, paged_attend, record
from jaxserve.engine.step_inputs import StepLayout
from models.ops.attention.kv_pool import KV_POOL_AXES
from models.ops.attention.registry import AttentionImplementation
from models.registry import get_family
from models.sharding import ModelSharding


def make_tick(
    sharding: ModelSharding,
    layout: StepLayout,
    attention: AttentionImplementation,
    params: Params,
) -> Callable[..., Any]:
    """The tick of one bucket for D replicas of P stages of T devices each.

    Its arguments: params; kv_pool `[L, D * (P + 1), ...]` of P pages a replica; slots of D * S;
    the rows between stages `[D, P, R, E]`, of which it uses the first T of R; inputs int32
    `[D, P, layout.size]`, of each stage's plan. All but the first and the last are donated. Its
    last result is int32 `[D, N, 3 + 2 * num_top]` of the last stage's plan, whole on every device.

    The first stage embeds, the last one has the head and samples; last tokens go to all stages.
    Tokens are counted (for penalties) in the last stage's slots alone.

    Args:
        sharding: of the model.
        layout: of one replica.
        attention: gets one device's heads.
        params: abstract.
    """
    config, shard = sharding.local_config, sharding.shard
    family = get_family(config.family)
    num_stages = sharding.shape.stage
    to_next = [(stage, stage + 1) for stage in range(num_stages - 1)]

    def tick(
        params: Params,
        kv_pool: jax.Array,
        slots: SlotState,
        between_stages: jax.Array,
        inputs: jax.Array,
    ) -> tuple[jax.Array, SlotState, jax.Array, jax.Array]:
        parts = layout.unpack(inputs.reshape(layout.size))
        work = layout.attention_work(parts)
        stage = lax.axis_index("stage")
        # All devices of a stage take the same branch, and exchange only with each other there.
        x = lax.cond(
            stage == 0,
            lambda: family.embed(params, config, input_tokens(layout, parts, slots), shard),
            lambda: between_stages[0, 0, : layout.num_rows],
        )
        first_layer = stage * sharding.num_local_layers
        x, kv_pool = family.run_layers(
            params,
            config,
            x,
            work.row_positions,
            kv_pool,
            paged_attend(config, layout, attention, work, first_layer, kv_pool=kv_pool),
            shard=shard,
            first_layer=first_layer,
            adapter_of_row=adapter_of_row(layout, params, parts, slots),
        )
        is_last = stage == num_stages - 1
        outputs = lax.cond(
            is_last,
            lambda: draw(config, layout, params, x, parts, slots, shard),
            lambda: jnp.zeros((layout.num_sample_rows, 3 + 2 * layout.num_top), jnp.int32),
        )
        slots = record(layout, parts, slots, outputs, is_last)
        last_token = jnp.where(is_last, slots.last_token, 0)
        outputs, last_token = lax.psum((outputs, last_token), "stage")
        slots = dataclasses.replace(slots, last_token=last_token)
        handed_on = lax.ppermute(x, "stage", to_next)
        between_stages = lax.dynamic_update_slice(
            between_stages, handed_on[None, None], (0, 0, 0, 0)
        )
        return kv_pool, slots, between_stages, lax.all_gather(outputs, "data")

    pool, slots = sharding.spec(KV_POOL_AXES), sharding.spec(("slots",))
    by_plan = sharding.spec(("replicas", "plans"))
    return jax.shard_map(
        tick,
        mesh=sharding.mesh,
        in_specs=(sharding.param_specs(params), pool, slots, by_plan, by_plan),
        out_specs=(pool, slots, by_plan, sharding.spec(())),
        # What is whole on several devices is computed alike on each, which jax cannot prove.
        check_vma=False,
    )
