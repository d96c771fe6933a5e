"""`ragged_paged_attention` against dense attention over ragged batches (SE5)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.ops.attention.kv_pool import write_rows
from models.ops.attention.registry import IMPLEMENTATIONS, select
from models.ops.attention.window import WHOLE_CONTEXT
from models.ops.attention.work import AttentionTiling, AttentionWork

NUM_LAYERS, NUM_PAGES, NUM_SLOTS, NUM_ROWS = 2, 24, 4, 40
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 6, 2, 8
TILING = AttentionTiling(page_size=4, pages_per_block=2, decode_group=2, tile_rows=4, tile_group=2)
PAGES_PER_SEQ = 6
WIDTH = TILING.page_table_width(PAGES_PER_SEQ)
CPU_IMPLEMENTATIONS = [impl.name for impl in IMPLEMENTATIONS if "cpu" in impl.platforms]


@dataclass(frozen=True)
class Sequence:
    """`num_new` rows at the end of a context of `length` tokens."""

    length: int
    num_new: int
    as_decode: bool


sequences = st.integers(1, PAGES_PER_SEQ * TILING.page_size).flatmap(
    lambda length: st.builds(
        Sequence,
        st.just(length),
        st.integers(1, min(length, NUM_ROWS // NUM_SLOTS)),
        st.booleans(),
    )
)


def build_work(batch: list[Sequence], rng: np.random.Generator) -> AttentionWork:
    """Random pages, decode items for single rows that ask for it, else tiles."""
    pages = rng.permutation(NUM_PAGES)
    table = np.full((NUM_SLOTS + 1, WIDTH), NUM_PAGES, np.int32)
    row_slots = np.full(NUM_ROWS, NUM_SLOTS, np.int32)
    positions = np.zeros(NUM_ROWS, np.int32)
    decodes: list[tuple[int, int]] = []
    tiles: list[tuple[int, int, int]] = []
    row = 0
    for slot, sequence in enumerate(batch):
        held = -(-sequence.length // TILING.page_size)
        table[slot, :held], pages = pages[:held], pages[held:]
        new = np.arange(sequence.length - sequence.num_new, sequence.length)
        row_slots[row : row + len(new)] = slot
        positions[row : row + len(new)] = new
        if sequence.num_new == 1 and sequence.as_decode:
            decodes.append((-sequence.length, row))
        else:
            for offset in range(0, len(new), TILING.tile_rows):
                count = min(TILING.tile_rows, len(new) - offset)
                tiles.append((-int(new[offset]), row + offset, count))
        row += len(new)
    decode_rows = np.full(TILING.max_decodes(NUM_ROWS, NUM_SLOTS), NUM_ROWS, np.int32)
    decode_rows[: len(decodes)] = [r for _, r in sorted(decodes)]
    num_tiles = TILING.max_tiles(NUM_ROWS, NUM_SLOTS)
    tile_starts = np.full(num_tiles, NUM_ROWS, np.int32)
    tile_num_rows = np.zeros(num_tiles, np.int32)
    for index, (_, start, count) in enumerate(sorted(tiles)):
        tile_starts[index], tile_num_rows[index] = start, count
    arrays = (
        table,
        row_slots,
        positions,
        decode_rows,
        np.int32(len(decodes)),
        tile_starts,
        tile_num_rows,
        np.int32(len(tiles)),
    )
    return AttentionWork(*(jnp.asarray(array) for array in arrays))


def dense(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, position: int, window: int | None
) -> np.ndarray:
    """One row `q [H, D]` over `keys, values [length, K, D]`, in float64."""
    group = NUM_HEADS // NUM_KV_HEADS
    first = 0 if window is None else max(0, position - window + 1)
    keys, values = keys[first : position + 1], values[first : position + 1]
    out = np.empty((NUM_HEADS, HEAD_DIM))
    for head in range(NUM_HEADS):
        scores = keys[:, head // group] @ q[head] / np.sqrt(HEAD_DIM)
        weights = np.exp(scores - scores.max())
        out[head] = weights @ values[:, head // group] / weights.sum()
    return out


@pytest.fixture(scope="module", params=CPU_IMPLEMENTATIONS)
def attention(request: pytest.FixtureRequest):
    """Compiled once per window: write this step's rows, then attend."""
    implementation = select(request.param, "cpu")

    @partial(jax.jit, static_argnames="fixed")
    def run(q, k, v, pool, layer, work, fixed, traced):
        pool = write_rows(pool, k, v, layer, work)
        window = fixed if traced is None else traced
        out = implementation.call(q, pool, layer, work, tiling=TILING, sliding_window=window)
        return out, pool

    return {
        None: partial(run, fixed=None, traced=None),
        5: partial(run, fixed=5, traced=None),
        # As of models whose layers differ: a value, not part of the program.
        "traced 5": partial(run, fixed=None, traced=np.int32(5)),
        "traced whole": partial(run, fixed=None, traced=np.int32(WHOLE_CONTEXT)),
    }


WINDOWS = {None: None, 5: 5, "traced 5": 5, "traced whole": None}


@settings(max_examples=60, deadline=None)
@given(
    batch=st.lists(sequences, max_size=NUM_SLOTS),
    window=st.sampled_from(list(WINDOWS)),
    layer=st.integers(0, NUM_LAYERS - 1),
    seed=st.integers(0, 2**31),
)
def test_equals_dense_attention_and_never_reads_poison(attention, batch, window, layer, seed):
    rng = np.random.default_rng(seed)
    work = build_work(batch, rng)
    shape = (NUM_LAYERS, NUM_PAGES + 1, TILING.page_size, 2, NUM_KV_HEADS, HEAD_DIM)
    pool = np.full(shape, np.nan, np.float32)  # free pages, the spare page, unused tails
    table = np.asarray(work.page_table)
    contexts = []
    for slot, sequence in enumerate(batch):
        context = rng.normal(size=(sequence.length, 2, NUM_KV_HEADS, HEAD_DIM)).astype(np.float32)
        contexts.append(context)
        for position in range(sequence.length - sequence.num_new):
            page = table[slot, position // TILING.page_size]
            pool[layer, page, position % TILING.page_size] = context[position]
    q = rng.normal(size=(NUM_ROWS, NUM_HEADS, HEAD_DIM)).astype(np.float32)
    k, v = np.full((2, NUM_ROWS, NUM_KV_HEADS, HEAD_DIM), np.nan, np.float32)
    row_slots, positions = np.asarray(work.row_slots), np.asarray(work.row_positions)
    live = np.flatnonzero(row_slots < NUM_SLOTS)
    for row in live:
        k[row], v[row] = contexts[row_slots[row]][positions[row]]
    out, new_pool = attention[window](q, k, v, pool, np.int32(layer), work)
    out, new_pool = np.asarray(out), np.asarray(new_pool)
    for row in live:
        context = contexts[row_slots[row]].astype(np.float64)
        expected = dense(q[row], context[:, 0], context[:, 1], positions[row], WINDOWS[window])
        np.testing.assert_allclose(out[row], expected, atol=2e-6, rtol=2e-6)
    padding = np.setdiff1d(np.arange(NUM_ROWS), live)
    assert not out[padding].any()
    other = 1 - layer
    assert np.isnan(new_pool[other]).all()


def test_row_bits_do_not_depend_on_neighbours_or_slot(attention):
    """The same sequence alone, among others and in another slot (SE4)."""
    target = Sequence(length=21, num_new=6, as_decode=False)
    decode = Sequence(length=17, num_new=1, as_decode=True)
    rng = np.random.default_rng(0)
    contexts = {
        sequence: rng.normal(size=(sequence.length, 2, NUM_KV_HEADS, HEAD_DIM)).astype(np.float32)
        for sequence in (target, decode)
    }
    queries = {
        sequence: rng.normal(size=(sequence.num_new, NUM_HEADS, HEAD_DIM)).astype(np.float32)
        for sequence in (target, decode)
    }
    others = [Sequence(24, 9, False), Sequence(24, 1, True)]
    seen: dict[Sequence, list[np.ndarray]] = {target: [], decode: []}
    for batch in ([target, decode], [decode, target], [*others, decode, target]):
        work = build_work(batch, rng)
        table = np.asarray(work.page_table)
        shape = (NUM_LAYERS, NUM_PAGES + 1, TILING.page_size, 2, NUM_KV_HEADS, HEAD_DIM)
        pool = rng.normal(size=shape).astype(np.float32)
        q = rng.normal(size=(NUM_ROWS, NUM_HEADS, HEAD_DIM)).astype(np.float32)
        k, v = rng.normal(size=(2, NUM_ROWS, NUM_KV_HEADS, HEAD_DIM)).astype(np.float32)
        rows = {}
        for slot, sequence in enumerate(batch):
            start = sum(other.num_new for other in batch[:slot])
            rows[sequence] = slice(start, start + sequence.num_new)
            if sequence not in contexts:
                continue
            context = contexts[sequence]
            for position in range(sequence.length):
                page = table[slot, position // TILING.page_size]
                pool[0, page, position % TILING.page_size] = context[position]
            q[rows[sequence]] = queries[sequence]
            k[rows[sequence]], v[rows[sequence]] = np.moveaxis(context[-sequence.num_new :], 1, 0)
        out, _ = attention[None](q, k, v, pool, np.int32(0), work)
        for sequence, outputs in seen.items():
            outputs.append(np.asarray(out)[rows[sequence]])
    for outputs in seen.values():
        for output in outputs[1:]:
            np.testing.assert_array_equal(output, outputs[0])


def test_unknown_implementation_is_named():
    with pytest.raises(ValueError, match=r"choose from: auto, .*reference"):
        select("flash", "cpu")
