"""Ragged batches for `ragged_paged_attention`: one battery for every implementation.

Pages that a row may not see are full of NaN, so that reading one shows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from models.ops.attention.kv_pool import write_rows
from models.ops.attention.reference import ragged_paged_attention
from models.ops.attention.work import AttentionTiling, AttentionWork

NUM_LAYERS = 2
PAGES_PER_BLOCK = 4
"""Of the reference."""


@dataclass(frozen=True)
class Sequence:
    """`num_new` rows at the end of a context of `length` tokens."""

    length: int
    num_new: int = 1
    as_decode: bool = True
    """Where it has one row: as a decode item, not as a tile."""


@dataclass(frozen=True)
class Case:
    name: str
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    sequences: tuple[Sequence, ...]
    num_rows: int
    window: int | None = None
    is_window_traced: bool = False
    page_size: int = 16
    table_pages: int | None = None
    """Width of the page table; None: as the longest sequence needs."""

    @property
    def max_pages(self) -> int:
        if self.table_pages is not None:
            return self.table_pages
        longest = max([sequence.length for sequence in self.sequences], default=1)
        pages = -(-longest // self.page_size)
        return -(-pages // PAGES_PER_BLOCK) * PAGES_PER_BLOCK

    @property
    def num_slots(self) -> int:
        return len(self.sequences) + 2


@dataclass(frozen=True)
class Inputs:
    """Arrays of one case, `pool` without this step's own rows."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    pool: np.ndarray
    work: AttentionWork
    layer: int
    tiling: AttentionTiling
    contexts: tuple[np.ndarray, ...]
    """Of each sequence, `[length, 2, K, D]`."""
    rows: tuple[slice, ...]
    """Of each sequence."""


def build(
    case: Case,
    tiling: AttentionTiling,
    rng: np.random.Generator,
    contexts: tuple[np.ndarray, ...] | None = None,
) -> Inputs:
    """Random pages and values; `contexts` fixes the values of the sequences."""
    dtype = np.dtype(ml_dtypes.bfloat16 if case.dtype == "bfloat16" else case.dtype)
    slots = rng.permutation(case.num_slots)[: len(case.sequences)]
    num_pages = case.max_pages * case.num_slots
    pages = list(rng.permutation(num_pages))
    table = np.full((case.num_slots + 1, case.max_pages), num_pages, np.int32)
    row_slots = np.full(case.num_rows, case.num_slots, np.int32)
    positions = np.zeros(case.num_rows, np.int32)
    heads = (case.num_kv_heads, case.head_dim)
    pool = np.full(
        (NUM_LAYERS, num_pages + 1, case.page_size, 2, *heads), np.nan, np.float32
    ).astype(dtype)
    layer = int(rng.integers(NUM_LAYERS))
    k, v = np.full((2, case.num_rows, *heads), np.nan, np.float32).astype(dtype)
    if contexts is None:
        contexts = tuple(
            rng.normal(size=(sequence.length, 2, *heads)).astype(dtype)
            for sequence in case.sequences
        )
    decodes: list[tuple[int, int]] = []
    tiles: list[tuple[int, int, int]] = []
    rows: list[slice] = []
    row = 0
    for slot, sequence, context in zip(slots, case.sequences, contexts, strict=True):
        held = -(-sequence.length // case.page_size)
        table[slot, :held] = [pages.pop() for _ in range(held)]
        new = np.arange(sequence.length - sequence.num_new, sequence.length)
        at = slice(row, row + len(new))
        rows.append(at)
        row_slots[at], positions[at] = slot, new
        k[at], v[at] = context[new, 0], context[new, 1]
        old = np.arange(new[0])
        pool[layer, table[slot, old // case.page_size], old % case.page_size] = context[old]
        if sequence.num_new == 1 and sequence.as_decode:
            decodes.append((-sequence.length, row))
        else:
            for offset in range(0, len(new), tiling.tile_rows):
                count = min(tiling.tile_rows, len(new) - offset)
                tiles.append((-int(new[offset]), row + offset, count))
        row += len(new)
    decode_rows = np.full(tiling.max_decodes(case.num_rows, case.num_slots), case.num_rows)
    decode_rows[: len(decodes)] = [at for _, at in sorted(decodes)]
    num_tiles = tiling.max_tiles(case.num_rows, case.num_slots)
    tile_starts, tile_num_rows = np.full(num_tiles, case.num_rows), np.zeros(num_tiles, int)
    for index, (_, start, count) in enumerate(sorted(tiles)):
        tile_starts[index], tile_num_rows[index] = start, count
    counts = len(decodes), len(tiles)
    arrays = (table, row_slots, positions, decode_rows, counts[0], tile_starts, tile_num_rows)
    work = AttentionWork(*(np.asarray(array, np.int32) for array in (*arrays, counts[1])))  # type: ignore[arg-type]
    q = rng.normal(size=(case.num_rows, case.num_heads, case.head_dim)).astype(dtype)
    stored = pool.view(np.uint16) if case.dtype == "bfloat16" else pool
    return Inputs(q, k, v, stored, work, layer, tiling, contexts, tuple(rows))


Runner = Callable[[Case, Inputs], tuple[np.ndarray, np.ndarray]]
"""(attention's output float32 `[T, H, D]`, the pool afterwards)."""


def run_reference(case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """The XLA implementation in float32 arithmetic on the same stored values; a `Runner`."""
    tiling = AttentionTiling(
        page_size=case.page_size,
        pages_per_block=PAGES_PER_BLOCK,
        decode_group=1,
        tile_rows=inputs.tiling.tile_rows,
        tile_group=1,
    )

    @jax.jit
    def run(
        q: jax.Array,
        k: jax.Array,
        v: jax.Array,
        pool: jax.Array,
        layer: jax.Array,
        work: AttentionWork,
        window: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        pool = write_rows(pool, k, v, layer, work)
        sliding = window if case.is_window_traced else case.window
        q = q.astype(jnp.float32)
        out = ragged_paged_attention(q, pool, layer, work, tiling=tiling, sliding_window=sliding)
        return out, pool

    layer, window = np.int32(inputs.layer), np.int32(case.window or 0)
    arrays = (inputs.q, inputs.k, inputs.v, inputs.pool, layer, inputs.work, window)
    out, pool = run(*arrays)
    return np.asarray(out), np.asarray(pool)


def dense(case: Case, inputs: Inputs) -> np.ndarray:
    """The oracle `[T, H, D]`: softmax of each sequence's whole score matrix, in float64."""
    out = np.zeros(inputs.q.shape)
    group = case.num_heads // case.num_kv_heads
    for sequence, context, rows in zip(case.sequences, inputs.contexts, inputs.rows, strict=True):
        length = sequence.length
        positions = np.arange(length - sequence.num_new, length)[:, None]
        keys = np.arange(length)[None, :]
        visible = keys <= positions
        if case.window is not None:
            visible &= keys > positions - case.window
        values = context.astype(np.float64)
        for kv_head in range(case.num_kv_heads):
            heads = slice(kv_head * group, (kv_head + 1) * group)
            q = inputs.q[rows, heads].astype(np.float64)
            scores = np.tensordot(q, values[:, 0, kv_head], (2, 1)) * case.head_dim**-0.5
            scores = np.where(visible[:, None], scores, -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            out[rows, heads] = weights @ values[:, 1, kv_head]
    return out


def relative_error(out: np.ndarray, expected: np.ndarray) -> float:
    """‖out - expected‖ / ‖expected‖; NaN never passes a limit."""
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(out.astype(np.float64) - expected)) / max(norm, 1e-30)


def limit(dtype: str) -> float:
    """Most relative error: float32 sums in another order; bfloat16 also rounds weights and
    outputs to 8 bits (2^-9 each on average)."""
    return 2e-6 if dtype == "float32" else 4e-3


def check(case: Case, run: Runner, inputs: Inputs) -> float:
    """Relative error against the oracle; raises AssertionError that names what is wrong."""
    out, pool = run(case, inputs)
    live = np.asarray(inputs.work.row_slots) < case.num_slots
    if out[~live].any() or np.isnan(out[~live]).any():
        raise AssertionError(f"{case.name}: padding rows are not zero")
    if not np.isfinite(out[live]).all():
        raise AssertionError(f"{case.name}: NaN or infinity: a key was read that no row sees")
    _, right_pool = run_write(inputs)
    if not np.array_equal(_bits(pool[:, :-1]), _bits(right_pool[:, :-1])):
        raise AssertionError(f"{case.name}: the pool does not hold what was written")
    error = relative_error(out[live], dense(case, inputs)[live]) if live.any() else 0.0
    if not error <= limit(case.dtype):
        raise AssertionError(f"{case.name}: relative error {error:.2e} > {limit(case.dtype):.0e}")
    return error


def run_write(inputs: Inputs) -> tuple[int, np.ndarray]:
    """The pool with this step's rows, and their number."""
    pool = inputs.pool.copy()
    work = inputs.work
    table, slots = np.asarray(work.page_table), np.asarray(work.row_slots)
    live = np.flatnonzero(slots < table.shape[0] - 1)
    positions = np.asarray(work.row_positions)[live]
    page_size = pool.shape[2]
    page_ids = table[slots[live], positions // page_size]
    rows = np.stack([inputs.k[live], inputs.v[live]], axis=1)
    pool[inputs.layer, page_ids, positions % page_size] = (
        rows.view(np.uint16) if pool.dtype == np.uint16 else rows
    )
    return len(live), pool


def _bits(pool: np.ndarray) -> np.ndarray:
    return pool.view(np.uint16 if pool.dtype.itemsize == 2 else np.uint32)


_MIXED = (
    Sequence(1200),
    Sequence(17),
    Sequence(513),
    Sequence(512),
    Sequence(1),
    Sequence(700, 90),
    Sequence(64, 64),
    Sequence(33, 5),
    Sequence(130, 1, as_decode=False),
)


def _case(name: str, heads: tuple[int, int, int], **changes: object) -> Case:
    values: dict[str, object] = {"dtype": "bfloat16", "sequences": _MIXED, "num_rows": 180}
    return Case(name, *heads, **(values | changes))  # type: ignore[arg-type]


BATTERY = (
    _case("llama-3-8b", (32, 8, 128)),
    _case("llama-3-8b, float32", (32, 8, 128), dtype="float32"),
    _case("llama-3-70b", (64, 8, 128)),
    _case("smollm2", (9, 3, 64)),
    _case("qwen2-7b, page 32", (28, 4, 128), page_size=32),
    _case("gemma-3, window 512", (4, 1, 256), window=512),
    _case("gemma-3, traced window", (8, 4, 256), window=100, is_window_traced=True),
    _case("mistral, window 256", (32, 8, 128), window=256),
    _case("falcon-7b", (71, 1, 64)),
    _case("falcon-180b", (232, 8, 64), num_rows=170, sequences=_MIXED[:5] + _MIXED[6:]),
    _case("gpt-2", (12, 12, 64)),
    _case("phi-3-mini, head dim 96", (32, 32, 96)),
    _case("head dim 80, float32", (10, 2, 80), dtype="float32", window=40),
    _case("nothing to do", (32, 8, 128), sequences=()),
)
"""Geometries of the families, each with long, short, whole-page and one-token contexts."""
