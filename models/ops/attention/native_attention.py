"""`ragged_paged_attention` and `write_rows` by the native CPU kernels.

They read live pages alone, in blocks of 64 keys from position 0 on. A row's bits do not depend on
whether it was a decode item or part of a tile.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from models.ops.attention.window import WHOLE_CONTEXT, Window
from models.ops.attention.work import AttentionTiling, AttentionWork


def native_attention(
    q: jax.Array,
    kv_pool: jax.Array,
    layer_index: jax.Array,
    work: AttentionWork,
    *,
    tiling: AttentionTiling,
    sliding_window: Window,
) -> jax.Array:
    """See `reference.ragged_paged_attention`, whose arguments and result it has."""
    del tiling
    window = WHOLE_CONTEXT if sliding_window is None else sliding_window
    call = jax.ffi.ffi_call("jaxserve_attention", jax.ShapeDtypeStruct(q.shape, q.dtype))
    out: jax.Array = call(
        q,
        kv_pool,
        jnp.asarray(layer_index, jnp.int32),
        jnp.asarray(window, jnp.int32),
        work.page_table,
        work.row_slots,
        work.row_positions,
        work.decode_rows,
        work.num_decodes,
        work.tile_starts,
        work.tile_num_rows,
        work.num_tiles,
    )
    return out


def native_write(
    kv_pool: jax.Array,
    k: jax.Array,
    v: jax.Array,
    layer_index: jax.Array,
    work: AttentionWork,
) -> jax.Array:
    """See `kv_pool.write_rows`; the pool is written in place."""
    call = jax.ffi.ffi_call(
        "jaxserve_write",
        jax.ShapeDtypeStruct(kv_pool.shape, kv_pool.dtype),
        input_output_aliases={0: 0},
    )
    written: jax.Array = call(
        kv_pool,
        k,
        v,
        jnp.asarray(layer_index, jnp.int32),
        work.page_table,
        work.row_slots,
        work.row_positions,
    )
    return written
