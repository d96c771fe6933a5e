"""Steps to be timed: the shapes of Llama-3-8B, pages in random order."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.attention.triton_attention import TritonAttention
from models.ops.attention.work import AttentionTiling, AttentionWork

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
NUM_LAYERS = 32
MAX_CONTEXT = 8192
NUM_SLOTS = 64
CHUNK = 512
NUM_PAGES = NUM_SLOTS * 1088 // PAGE
"""Of a layer in the pool that timings read."""


def random_pool(num_pages: int, num_layers: int) -> jax.Array:
    """Random bfloat16 values `[num_layers, num_pages + 1, PAGE, 2, K, D]` as their bits."""
    shape = (num_pages + 1, PAGE, 2, NUM_KV_HEADS, HEAD_DIM)

    @jax.jit
    def fill(key: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            values = jax.random.normal(key, shape, jnp.bfloat16)
            return jax.lax.bitcast_convert_type(values, jnp.uint16)

        pool: jax.Array = jax.lax.map(one, jax.random.split(key, num_layers))
        return pool

    pool: jax.Array = fill(jax.random.key(3))
    return pool


def make_work(
    tiling: AttentionTiling,
    num_rows: int,
    decode_contexts: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    num_slots: int = NUM_SLOTS,
) -> AttentionWork:
    """Decodes, then chunks (start, rows), with pages in random order."""
    lengths = [*decode_contexts, *(start + rows for start, rows in chunks)]
    news = [1] * len(decode_contexts) + [rows for _, rows in chunks]
    width = MAX_CONTEXT // PAGE
    total = sum(-(-length // PAGE) for length in lengths)
    pages = np.random.default_rng(0).permutation(total)
    table = np.full((num_slots + 1, width), 0, np.int32)
    row_slots = np.full(num_rows, num_slots, np.int32)
    positions = np.zeros(num_rows, np.int32)
    row = 0
    tiles = []
    for slot, (length, new) in enumerate(zip(lengths, news, strict=True)):
        held = -(-length // PAGE)
        table[slot, :held], pages = pages[:held], pages[held:]
        row_slots[row : row + new] = slot
        positions[row : row + new] = np.arange(length - new, length)
        if slot >= len(decode_contexts):
            for offset in range(0, new, tiling.tile_rows):
                count = min(tiling.tile_rows, new - offset)
                tiles.append((-(length - new + offset), row + offset, count))
        row += new
    decode_rows = np.full(tiling.max_decodes(num_rows, num_slots), num_rows, np.int32)
    decode_rows[: len(decode_contexts)] = np.argsort(-np.asarray(decode_contexts), kind="stable")
    num_tiles = tiling.max_tiles(num_rows, num_slots)
    starts, counts = np.full(num_tiles, num_rows, np.int32), np.zeros(num_tiles, np.int32)
    for index, (_, start, count) in enumerate(sorted(tiles)):
        starts[index], counts[index] = start, count
    arrays = (table, row_slots, positions, decode_rows, np.int32(len(decode_contexts)))
    arrays += (starts, counts, np.int32(len(tiles)))  # type: ignore[assignment]
    return AttentionWork(*(jnp.asarray(array) for array in arrays))


def layers(
    attention: TritonAttention,
    tiling: AttentionTiling,
    q: jax.Array,
    pool: jax.Array,
    work: AttentionWork,
    num_layers: int,
) -> jax.Array:
    """The attention of a whole model: each layer's output is the next one's queries."""
    prepared = attention.prepare(
        work, tiling=tiling, dtype=jnp.dtype(jnp.bfloat16), head_dim=HEAD_DIM
    )
    for layer in range(num_layers):
        q = attention(q, pool, jnp.int32(layer), prepared, tiling=tiling, sliding_window=None)
    return q


def queries(num_rows: int) -> jax.Array:
    """`[num_rows, H, D]`."""
    return jax.random.normal(jax.random.key(4), (num_rows, NUM_HEADS, HEAD_DIM), jnp.bfloat16)
