"""`ragged_paged_attention` for NVIDIA GPUs: what the Triton kernels get, and in what shapes.

bfloat16 products are summed in float32; softmax weights are rounded to bfloat16 before they
multiply the values, so against the float32 reference an output is off by about 2^-8 of the
largest value. float32 pools are multiplied in float32 (never tf32).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from models.ops.attention.triton_call import KernelConfig, triton_call
from models.ops.attention.window import Window
from models.ops.attention.work import AttentionTiling, AttentionWork

MIN_ROWS = 16
"""Rows of the smallest matrix product of a tensor core."""
MIN_HEAD_DIM = 16
MAX_SPLITS = 32
"""Bounds the memory for parts of a row's result, and what one program merges."""
UNIT_PROGRAMS = 1024
"""Programs that share a step's splits: enough to fill any GPU, few enough to be idle cheaply."""

MERGED_HEADS, MERGED_SPLITS = 4, 4
"""Of one program that joins splits: query heads, and splits read at once."""


@dataclass(frozen=True, slots=True)
class TritonConfig:
    """Sizes that change speed and rounding, never the function computed."""

    decode_block: int
    """Keys that a decode program multiplies at once."""
    decode: KernelConfig
    split_keys: int
    """Keys of a split; a multiple of `decode_block`."""
    tile_rows: int
    """Rows of a prefill program: rows of the tile times query heads of a KV head."""
    tile_block: int
    tile: KernelConfig


FLOAT32 = TritonConfig(32, KernelConfig(4, 2), 512, 16, 32, KernelConfig(4, 2))
HEAD_DIM_256 = TritonConfig(32, KernelConfig(4, 3), 512, 64, 32, KernelConfig(4, 2))
DEFAULT = TritonConfig(64, KernelConfig(2, 4), 512, 64, 64, KernelConfig(4, 3))


def choose_config(dtype: jnp.dtype, head_dim: int) -> TritonConfig:
    """The sizes for pool values of `dtype`."""
    if dtype == jnp.float32:
        return FLOAT32
    return HEAD_DIM_256 if head_dim > 128 else DEFAULT


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["work", "items", "units", "num_units"],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class TritonWork:
    """A step's work list with the decodes cut into splits; the same for every layer."""

    work: AttentionWork
    items: jax.Array
    """int32 [ND, 2]: row and position of each decode item; position -1 past the last."""
    units: jax.Array
    """int32 [ND * max splits, 4]: item * max splits + split, row, position, slot; longest item
    first."""
    num_units: jax.Array
    """int32 []"""


@dataclass(frozen=True, slots=True)
class TritonAttention:
    """The op for one kind of GPU.

    Args:
        compute_capability: 80 for A100, 90 for H100.
        config: sizes; None chooses by dtype and head dimension.
        call: launches a kernel by name, see `triton_call`.
    """

    compute_capability: int
    config: TritonConfig | None = None
    call: Callable[..., list[jax.Array]] = triton_call

    def tiling(self, page_size: int, num_heads: int, num_kv_heads: int) -> AttentionTiling:
        """Tiles whose rows times query heads fill whole programs."""
        group = num_heads // num_kv_heads
        rows = max(16, (self.config or DEFAULT).tile_rows // group)
        return AttentionTiling(
            page_size=page_size, pages_per_block=1, decode_group=1, tile_rows=rows, tile_group=1
        )

    def prepare(
        self, work: AttentionWork, *, tiling: AttentionTiling, dtype: jnp.dtype, head_dim: int
    ) -> TritonWork:
        """Once a step, before the layers."""
        config = self.config or choose_config(dtype, head_dim)
        split_keys, max_splits = _splits(work, tiling, config)
        num_items = work.decode_rows.shape[0]
        live = jnp.arange(num_items) < work.num_decodes
        rows = jnp.minimum(work.decode_rows, work.row_positions.shape[0] - 1)
        positions = jnp.where(live, work.row_positions[rows], -1)
        last_split = jnp.maximum(positions - _tail_keys(split_keys), 0) // split_keys
        counts = jnp.where(live, last_split + 1, 0)
        ends = jnp.cumsum(counts)
        unit = jnp.arange(num_items * max_splits)
        item = jnp.sum(ends[None, :] <= unit[:, None], axis=1)
        item = jnp.minimum(item, num_items - 1)
        split = unit - (ends - counts)[item]
        items = jnp.stack([rows, positions], axis=1)
        code = item * max_splits + split
        slots = work.row_slots[rows[item]]
        units = jnp.stack([code, rows[item], positions[item], slots], axis=1)
        return TritonWork(work, items, units, ends[-1])

    def write(
        self,
        kv_pool: jax.Array,
        k: jax.Array,
        v: jax.Array,
        layer_index: jax.Array,
        prepared: TritonWork,
    ) -> jax.Array:
        """Stores keys and values `[T, K, D]` of one layer's rows, in place."""
        work = prepared.work
        num_rows, num_kv_heads, head_dim = k.shape
        constants = {
            "NUM_SLOTS": work.page_table.shape[0] - 1,
            "NUM_PAGES": kv_pool.shape[1],
            "TABLE_WIDTH": work.page_table.shape[1],
            "PAGE": kv_pool.shape[2],
            "ROW_SIZE": num_kv_heads * head_dim,
            "ROW_PAD": _power_of_two(num_kv_heads * head_dim),
            "POOL_DTYPE": _values_dtype(kv_pool).name,
        }
        arrays = [k, v, layer_index, work.page_table, work.row_slots, work.row_positions, kv_pool]
        return self.call(
            "write_kernel",
            arrays,
            [_like(kv_pool)],
            grid=(num_rows,),
            constants=constants,
            config=KernelConfig(4, 1),
            compute_capability=self.compute_capability,
            aliases={len(arrays) - 1: 0},
        )[0]

    def __call__(
        self,
        q: jax.Array,
        kv_pool: jax.Array,
        layer_index: jax.Array,
        prepared: TritonWork,
        *,
        tiling: AttentionTiling,
        sliding_window: Window,
    ) -> jax.Array:
        """See `reference.ragged_paged_attention`; `prepared` is what `prepare` returned."""
        work = prepared.work
        num_heads, head_dim = q.shape[1:]
        num_kv_heads = kv_pool.shape[4]
        values_dtype = _values_dtype(kv_pool)
        config = self.config or choose_config(values_dtype, head_dim)
        q = q.astype(values_dtype)
        window = jnp.asarray(0 if sliding_window is None else sliding_window, jnp.int32)
        head_pad = max(MIN_HEAD_DIM, _power_of_two(head_dim))
        shared = {
            "scale_log2": head_dim**-0.5 * math.log2(math.e),
            "NUM_HEADS": num_heads,
            "D": head_dim,
            "D_PAD": head_pad,
            "HAS_WINDOW": sliding_window is not None,
        }
        paged = shared | {
            "NUM_PAGES": kv_pool.shape[1],
            "TABLE_WIDTH": work.page_table.shape[1],
            "PAGE": kv_pool.shape[2],
            "NUM_KV_HEADS": num_kv_heads,
            "POOL_DTYPE": values_dtype.name,
            "PRECISION": "ieee",
        }
        source = [q, kv_pool, layer_index, window, work.page_table]
        out = self._decodes(source, prepared, tiling, config, shared, paged)
        return self._tiles(source, out, work, tiling, config, paged)

    def _decodes(
        self,
        source: list[jax.Array],
        prepared: TritonWork,
        tiling: AttentionTiling,
        config: TritonConfig,
        shared: dict[str, Any],
        paged: dict[str, Any],
    ) -> jax.Array:
        """`[T, H, D]` with the rows of decode items written."""
        q, window = source[0], source[3]
        num_heads, head_dim = q.shape[1:]
        group = num_heads // paged["NUM_KV_HEADS"]
        split_keys, max_splits = _splits(prepared.work, tiling, config)
        num_items = prepared.items.shape[0]
        rows = min(64, max(MIN_ROWS, _power_of_two(group)))
        pieces = paged["NUM_KV_HEADS"] * -(-group // rows)
        programs = min(num_items * max_splits, -(-UNIT_PROGRAMS // pieces))
        split = {"MAX_SPLITS": max_splits, "SPLIT": split_keys, "TAIL": _tail_keys(split_keys)}
        places = (num_items, num_heads, max_splits)
        out, partial_sums, stats = self.call(
            "decode_kernel",
            [
                *source,
                prepared.units,
                prepared.num_units,
            ],
            [
                _like(q),
                jax.ShapeDtypeStruct((*places, head_dim), jnp.float32),
                jax.ShapeDtypeStruct((*places, 2), jnp.float32),
            ],
            grid=(pieces, programs),
            constants=paged
            | split
            | {
                "NUM_UNIT_PROGRAMS": programs,
                "M": rows,
                "PIECES": pieces // paged["NUM_KV_HEADS"],
                "BLOCK": config.decode_block,
            },
            config=config.decode,
            compute_capability=self.compute_capability,
        )
        if max_splits == 1:
            return out
        arrays = [partial_sums, stats, window, prepared.items, out]
        return self.call(
            "merge_kernel",
            arrays,
            [_like(out)],
            grid=(-(-num_heads // MERGED_HEADS), num_items),
            constants=shared
            | split
            | {
                "SPLITS_PAD": _power_of_two(max_splits),
                "HEADS": MERGED_HEADS,
                "SPLITS": MERGED_SPLITS,
            },
            config=KernelConfig(4, 1),
            compute_capability=self.compute_capability,
            aliases={len(arrays) - 1: 0},
        )[0]

    def _tiles(
        self,
        source: list[jax.Array],
        out: jax.Array,
        work: AttentionWork,
        tiling: AttentionTiling,
        config: TritonConfig,
        paged: dict[str, Any],
    ) -> jax.Array:
        """`out` with the rows of tiles written and padding rows cleared."""
        group = paged["NUM_HEADS"] // paged["NUM_KV_HEADS"]
        rows = min(config.tile_rows, max(MIN_ROWS, _power_of_two(tiling.tile_rows * group)))
        pieces = -(-tiling.tile_rows * group // rows)
        arrays = [
            *source,
            work.row_slots,
            work.row_positions,
            work.tile_starts,
            work.tile_num_rows,
            work.num_tiles,
            out,
        ]
        return self.call(
            "tile_kernel",
            arrays,
            [_like(out)],
            grid=(paged["NUM_KV_HEADS"] * pieces, work.tile_starts.shape[0]),
            constants=paged
            | {
                "NUM_ROWS": out.shape[0],
                "NUM_SLOTS": work.page_table.shape[0] - 1,
                "TILE_ROWS": tiling.tile_rows,
                "M": rows,
                "PIECES": pieces,
                "BLOCK": config.tile_block,
            },
            config=config.tile,
            compute_capability=self.compute_capability,
            aliases={len(arrays) - 1: 0},
        )[0]


def _splits(work: AttentionWork, tiling: AttentionTiling, config: TritonConfig) -> tuple[int, int]:
    """Keys of a split and most splits of a row: static, so the same for every step."""
    max_context = work.page_table.shape[1] * tiling.page_size
    split_keys = config.split_keys
    while -(-max_context // split_keys) > MAX_SPLITS:
        split_keys *= 2
    return split_keys, -(-max_context // split_keys)


def _tail_keys(split_keys: int) -> int:
    """What a row's last split takes beyond its length: a context just over a whole number of
    splits has no unit of its own for the few keys."""
    return split_keys // 4


def _values_dtype(kv_pool: jax.Array) -> jnp.dtype:
    return jnp.dtype(jnp.bfloat16 if kv_pool.dtype == jnp.uint16 else kv_pool.dtype)


def _like(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype)


def _power_of_two(value: int) -> int:
    """The next one, `value` included."""
    return 1 << (value - 1).bit_length()
