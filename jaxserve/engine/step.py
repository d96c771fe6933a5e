"""The step: one pure function, compiled ahead of time once per bucket.

    step(params, kv_pool, slots, inputs) -> (kv_pool, slots, outputs)

`kv_pool` and `slots` are donated and updated in place. Shapes, dtypes and the
structure of every argument are the same for every plan of a bucket.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxserve.engine.plan import NO_TOKEN, TAKE_FROM_SLOT, StepResults
from jaxserve.engine.sampler import SampleOutput, row_peaks, sample
from jaxserve.engine.slots import SlotState
from jaxserve.engine.step_inputs import PADDING_TARGET, StepLayout
from models.config import ModelConfig
from models.decoder import Attend
from models.native_layout import PACKED_HEAD
from models.ops.attention.kv_pool import values_dtype
from models.ops.attention.registry import AttentionImplementation
from models.ops.attention.window import layer_window
from models.ops.attention.work import AttentionWork
from models.ops.native_rows import native_peaks
from models.ops.tensor_shard import TensorShard
from models.registry import get_family

Params = Any
"""The model's pytree of weights; with the pool of adapters as `adapters`, if there is one."""

StepFunction = Callable[
    [Params, jax.Array, SlotState, jax.Array], tuple[jax.Array, SlotState, jax.Array]
]


def make_step(
    config: ModelConfig,
    layout: StepLayout,
    attention: AttentionImplementation,
    shard: TensorShard | None = None,
) -> StepFunction:
    """Builds the step of one bucket.

    Its arguments: params; kv_pool `[L, P + 1, page_size, 2, K, D]`; slots;
    inputs int32 `[layout.size]`. Its last result is int32
    `[N, 3 + 2 * num_top]`, see `unpack_outputs`.

    With `shard`, it computes one device's part inside `shard_map`: config, params and pool are
    that part's, slots, inputs and outputs are the same on each.
    """
    family = get_family(config.family)

    def step(
        params: Params, kv_pool: jax.Array, slots: SlotState, inputs: jax.Array
    ) -> tuple[jax.Array, SlotState, jax.Array]:
        parts = layout.unpack(inputs)
        work = layout.attention_work(parts)
        x = family.embed(params, config, input_tokens(layout, parts, slots), shard)
        attend = paged_attend(config, layout, attention, work, kv_pool=kv_pool)
        x, kv_pool = family.run_layers(
            params,
            config,
            x,
            work.row_positions,
            kv_pool,
            attend,
            shard=shard,
            num_live=_num_live(work.row_slots < layout.num_slots),
            adapter_of_row=adapter_of_row(layout, params, parts, slots),
        )
        outputs = draw(config, layout, params, x, parts, slots, shard)
        return kv_pool, record(layout, parts, slots, outputs), outputs

    return step


def input_tokens(layout: StepLayout, parts: Mapping[str, jax.Array], slots: SlotState) -> jax.Array:
    """The token of each row, int32 `[T]`."""
    from_slot = parts["tokens"] == TAKE_FROM_SLOT
    live_slots = jnp.minimum(parts["row_slots"], layout.num_slots - 1)
    return jnp.where(from_slot, slots.last_token[live_slots], parts["tokens"])


def adapter_of_row(
    layout: StepLayout, params: Params, parts: Mapping[str, jax.Array], slots: SlotState
) -> jax.Array | None:
    """The adapter of each row, int32 `[T]`, 0 for none; None if there is no room for any."""
    if "adapters" not in params:
        return None
    adapters: jax.Array = slots.adapter[jnp.minimum(parts["row_slots"], layout.num_slots - 1)]
    return adapters


def paged_attend(
    config: ModelConfig,
    layout: StepLayout,
    attention: AttentionImplementation,
    work: AttentionWork,
    first_layer: int | jax.Array = 0,
    *,
    kv_pool: jax.Array,
) -> Attend[jax.Array]:
    """Attention over the pages of `kv_pool`, whose first layer is the model's `first_layer`."""
    prepared = attention.prepare(
        work,
        tiling=layout.tiling,
        dtype=values_dtype(kv_pool.dtype),
        head_dim=config.head_dim,
    )

    def attend(
        q: jax.Array, k: jax.Array, v: jax.Array, pool: jax.Array, layer_index: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        pool_layer = layer_index - first_layer
        pool = attention.write(pool, k, v, pool_layer, prepared)
        out = attention.call(
            q,
            pool,
            pool_layer,
            prepared,
            tiling=layout.tiling,
            sliding_window=layer_window(config, layer_index),
        )
        return out, pool

    return attend


def draw(
    config: ModelConfig,
    layout: StepLayout,
    params: Params,
    x: jax.Array,
    parts: Mapping[str, jax.Array],
    slots: SlotState,
    shard: TensorShard | None,
) -> jax.Array:
    """The last layer's rows `x [T, E]` to the step's outputs."""
    rows, targets = parts["sample_rows"], parts["sample_targets"]
    num_live = _num_live(targets != PADDING_TARGET)
    logits = get_family(config.family).logits(params, config, x[rows], shard, num_live)
    # The drawn token stands one position after the row that predicts it.
    positions = parts["row_positions"][rows] + 1
    # XLA's searches cost what a bucket's rows cost, and more than a packed head's product.
    find_peaks = partial(native_peaks, num_live=num_live) if PACKED_HEAD in params else row_peaks
    output = sample(logits, slots, _sample_slots(layout, parts), positions, targets, find_peaks)
    # NaN or infinity: there is no next token, and the request ends as an error.
    _, is_sound = find_peaks(logits)
    token_ids = jnp.where(is_sound, output.token_ids, NO_TOKEN)
    return _pack_outputs(dataclasses.replace(output, token_ids=token_ids))


def _num_live(is_live: jax.Array) -> jax.Array:
    """How many rows `bool [rows]` there are up to the last live one, int32."""
    return jnp.max(jnp.where(is_live, jnp.arange(1, is_live.shape[0] + 1), 0)).astype(jnp.int32)


def record(
    layout: StepLayout,
    parts: Mapping[str, jax.Array],
    slots: SlotState,
    outputs: jax.Array,
    is_mine: bool | jax.Array = True,
) -> SlotState:
    """Stores the drawn tokens as last tokens and counts them; nothing unless `is_mine`."""
    is_drawn = (parts["sample_targets"] == -1) & is_mine
    target_slots = jnp.where(is_drawn, _sample_slots(layout, parts), layout.num_slots)
    token_ids = jnp.maximum(outputs[:, 0], 0)
    return dataclasses.replace(
        slots,
        last_token=slots.last_token.at[target_slots].set(token_ids, mode="drop"),
        token_counts=slots.token_counts.at[target_slots, token_ids].add(1, mode="drop"),
    )


def _sample_slots(layout: StepLayout, parts: Mapping[str, jax.Array]) -> jax.Array:
    """The slot of each sample row, int32 `[N]`; any valid one for padding."""
    slots: jax.Array = jnp.minimum(parts["row_slots"], layout.num_slots - 1)[parts["sample_rows"]]
    return slots


def _pack_outputs(output: SampleOutput) -> jax.Array:
    """One int32 array, so that a step costs one device-to-host copy."""

    def as_int(x: jax.Array) -> jax.Array:
        return lax.bitcast_convert_type(x, jnp.int32)

    return jnp.concatenate(
        [
            output.token_ids[:, None],
            as_int(output.logprobs)[:, None],
            output.ranks[:, None],
            output.top_ids,
            as_int(output.top_logprobs),
        ],
        axis=1,
    )


def unpack_outputs(step_id: int, outputs: np.ndarray, num_live: int) -> StepResults:
    """The host's view of a step's int32 output `[N, 3 + 2 * num_top]`."""
    live = outputs[:num_live]
    num_top = (outputs.shape[1] - 3) // 2
    floats = live.view(np.float32)
    return StepResults(
        step_id=step_id,
        token_ids=live[:, 0],
        logprobs=floats[:, 1],
        ranks=live[:, 2],
        top_ids=live[:, 3 : 3 + num_top],
        top_logprobs=floats[:, 3 + num_top :],
    )
