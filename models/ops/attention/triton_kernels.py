"""The Triton kernels of attention over pages, for NVIDIA GPUs from compute capability 8.0.

Online softmax over blocks of keys, as in FlashAttention-2 (Dao 2023, section 3.1); long contexts
of decodes are split and merged as in Flash-Decoding. Splits have a fixed length in keys and are
merged by one tree of fixed shape, and blocks begin at multiples of their length, so a row's
arithmetic depends on its own context alone. A block that is masked for a row leaves its state's
bits as they are: it scales by exp2(0) = 1 and adds zeros.

`triton_attention.py` says what goes in. This module needs Triton, so nothing imports it before a
kernel is asked for.
"""

# Kernels are no Python at run time: their arguments are pointers, and capitals are compile-time.
# `*_before_ptr` is the memory of the result under its name as an argument.
# mypy: ignore-errors
# ruff: noqa: N803, ARG001

import triton
import triton.language as tl

MASKED = tl.constexpr(-1.0e30)
"""Finite: infinities would leave NaN where everything is masked."""


@triton.jit
def _attend(
    q,
    positions,
    pages_ptr,
    head_ptr,
    first_block,
    end,
    first_key,
    scale_log2,
    window,
    peak,
    total,
    acc,
    PAGE: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    BLOCK: tl.constexpr,
    MASK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Takes keys `first_block .. end - 1` into the state `(peak [M], total [M], acc [M, D_PAD])`.

    `q [M, D_PAD]`; `positions [M]`: the last key that a row sees; `pages_ptr`: the sequence's page
    ids; `head_ptr`: where page 0 would hold the KV head's first key. Without `MASK` every row sees
    every key of the range, which then is whole blocks.
    """
    dims = tl.arange(0, D_PAD)
    token_stride: tl.constexpr = 2 * NUM_KV_HEADS * D
    page_stride: tl.constexpr = PAGE * token_stride
    value_offset: tl.constexpr = NUM_KV_HEADS * D
    for block in range(first_block, end, BLOCK):
        keys = block + tl.arange(0, BLOCK)
        if MASK:
            # Nothing else is read: what other keys hold may be NaN.
            held = (keys < end) & (keys >= first_key)
            page_ids = tl.load(pages_ptr + keys // PAGE, mask=held, other=0)
            offsets = page_ids.to(tl.int64) * page_stride + (keys % PAGE) * token_stride
            pointers = head_ptr + offsets[:, None] + dims[None, :]
            present = held[:, None] & (dims < D)[None, :]
            k = tl.load(pointers, mask=present, other=0.0)
            v = tl.load(pointers + value_offset, mask=present, other=0.0)
        else:
            page_ids = tl.load(pages_ptr + keys // PAGE)
            offsets = page_ids.to(tl.int64) * page_stride + (keys % PAGE) * token_stride
            pointers = head_ptr + offsets[:, None] + dims[None, :]
            if D == D_PAD:
                k = tl.load(pointers)
                v = tl.load(pointers + value_offset)
            else:
                k = tl.load(pointers, mask=(dims < D)[None, :], other=0.0)
                v = tl.load(pointers + value_offset, mask=(dims < D)[None, :], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if MASK:
            visible = keys[None, :] <= positions[:, None]
            if HAS_WINDOW:
                visible = visible & (keys[None, :] > positions[:, None] - window)
            scores = tl.where(visible, scores, MASKED)
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        scaled_peak = new_peak * scale_log2
        if MASK:
            # A fused operation does not round MASKED * scale_log2, so it would leave not zero but
            # the rounding of `scaled_peak`, 1e21, where a row has seen no key yet.
            scaled_peak = tl.where(new_peak == MASKED, 0.0, scaled_peak)
        # One fused operation in every variant of the loop, so that they round alike.
        weights = tl.exp2(tl.fma(scores, scale_log2, -scaled_peak[:, None]))
        shrink = tl.exp2(peak * scale_log2 - scaled_peak)
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(v.dtype), v, acc, input_precision=PRECISION)
        peak = new_peak
    return peak, total, acc


@triton.jit
def decode_kernel(
    q_ptr,
    pool_ptr,
    layer_ptr,
    window_ptr,
    table_ptr,
    units_ptr,
    num_units_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    scale_log2: tl.constexpr,
    NUM_UNIT_PROGRAMS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    POOL_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Decode items: programs (KV head x piece of its query heads, units taken in turn).

    A unit is one split of one item, `units [., 4]`: item * MAX_SPLITS + split, row, position and
    slot, together because each read that waits for another delays the first key. The only split
    of a row is finished here; others leave `acc` in `partial [ND, H, MAX_SPLITS, D]` and
    (peak, total) in `stats [ND, H, MAX_SPLITS, 2]`.
    """
    kv_head = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    layer = tl.load(layer_ptr).to(tl.int64)
    num_units = tl.load(num_units_ptr)
    token_stride: tl.constexpr = 2 * NUM_KV_HEADS * D
    layer_stride: tl.constexpr = NUM_PAGES * PAGE * token_stride
    head_ptr = pool_ptr.to(tl.pointer_type(POOL_DTYPE)) + layer * layer_stride + kv_head * D
    in_group = piece * M + tl.arange(0, M)
    heads = kv_head * group + in_group
    dims = tl.arange(0, D_PAD)
    live = (in_group < group)[:, None] & (dims < D)[None, :]
    for unit in range(tl.program_id(1), num_units, NUM_UNIT_PROGRAMS):
        code = tl.load(units_ptr + unit * 4)
        row = tl.load(units_ptr + unit * 4 + 1)
        position = tl.load(units_ptr + unit * 4 + 2)
        slot = tl.load(units_ptr + unit * 4 + 3)
        item = code // MAX_SPLITS
        split = code % MAX_SPLITS
        first_key = 0
        window = 0
        if HAS_WINDOW:
            window = tl.load(window_ptr)
            first_key = tl.maximum(position - window + 1, 0)
        last_split = _last_split(position, SPLIT, TAIL)
        first_block = tl.maximum(split * SPLIT, first_key // BLOCK * BLOCK)
        end = tl.where(split == last_split, position + 1, (split + 1) * SPLIT)
        if end > first_key:
            q = tl.load(
                q_ptr + row * (NUM_HEADS * D) + heads[:, None] * D + dims[None, :],
                mask=live,
                other=0.0,
            )
            peak, total, acc = _attend(
                q,
                tl.full([M], 0, tl.int32) + position,
                table_ptr + slot * TABLE_WIDTH,
                head_ptr,
                first_block,
                end,
                first_key,
                scale_log2,
                window,
                tl.full([M], MASKED, tl.float32),
                tl.zeros([M], tl.float32),
                tl.zeros([M, D_PAD], tl.float32),
                PAGE,
                NUM_KV_HEADS,
                D,
                D_PAD,
                BLOCK,
                True,
                HAS_WINDOW,
                PRECISION,
            )
            if tl.minimum(first_key // SPLIT, last_split) == last_split:
                out = acc / total[:, None]
                tl.store(
                    out_ptr + row * (NUM_HEADS * D) + heads[:, None] * D + dims[None, :],
                    out.to(out_ptr.dtype.element_ty),
                    mask=live,
                )
            else:
                places = (item * NUM_HEADS + heads) * MAX_SPLITS + split
                tl.store(partial_ptr + places[:, None] * D + dims[None, :], acc, mask=live)
                tl.store(stats_ptr + places * 2, peak, mask=in_group < group)
                tl.store(stats_ptr + places * 2 + 1, total, mask=in_group < group)


@triton.jit
def _last_split(position, SPLIT: tl.constexpr, TAIL: tl.constexpr):
    """Of a row. The last one takes up to TAIL keys more: so few would not be worth a unit."""
    return tl.maximum(position - TAIL, 0) // SPLIT


@triton.jit
def merge_kernel(
    partial_ptr,
    stats_ptr,
    window_ptr,
    items_ptr,
    out_before_ptr,
    out_ptr,
    scale_log2: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
    SPLITS_PAD: tl.constexpr,
    SPLIT: tl.constexpr,
    TAIL: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    SPLITS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
):
    """Joins the splits of decode rows that have several: programs (`HEADS` query heads, item).

    `items [ND, 2]`: row and position of each, which is -1 past the last item. `SPLITS` parts are
    read at once.
    """
    item = tl.program_id(1)
    row = tl.load(items_ptr + item * 2)
    position = tl.load(items_ptr + item * 2 + 1)
    last_split = _last_split(position, SPLIT, TAIL)
    first_split = 0
    if HAS_WINDOW:
        first_key = tl.maximum(position - tl.load(window_ptr) + 1, 0)
        first_split = tl.minimum(first_key // SPLIT, last_split)
    if first_split == last_split:
        return
    heads = tl.program_id(0) * HEADS + tl.arange(0, HEADS)
    exists = heads < NUM_HEADS
    head_places = (item * NUM_HEADS + heads) * MAX_SPLITS
    dims = tl.arange(0, D_PAD)
    every = tl.arange(0, SPLITS_PAD)
    used = exists[:, None] & ((every >= first_split) & (every <= last_split))[None, :]
    stats = stats_ptr + (head_places[:, None] + every[None, :]) * 2
    peaks = tl.load(stats, mask=used, other=MASKED)
    totals = tl.load(stats + 1, mask=used, other=0.0)
    scaled_peak = tl.max(peaks, 1) * scale_log2
    shares = tl.exp2(peaks * scale_log2 - scaled_peak[:, None])
    total = tl.sum(totals * shares, 1)
    acc = tl.zeros([HEADS, D_PAD], tl.float32)
    for first in range(first_split, last_split + 1, SPLITS):
        some = first + tl.arange(0, SPLITS)
        taken = exists[:, None] & (some <= last_split)[None, :]
        places = head_places[:, None] + some[None, :]
        some_peaks = tl.load(stats_ptr + places * 2, mask=taken, other=MASKED)
        some_shares = tl.exp2(some_peaks * scale_log2 - scaled_peak[:, None])
        accs = tl.load(
            partial_ptr + places[:, :, None] * D + dims[None, None, :],
            mask=taken[:, :, None] & (dims < D)[None, None, :],
            other=0.0,
        )
        acc += tl.sum(accs * some_shares[:, :, None], 1)
    out = acc / total[:, None]
    tl.store(
        out_ptr + row * (NUM_HEADS * D) + heads[:, None] * D + dims[None, :],
        out.to(out_ptr.dtype.element_ty),
        mask=exists[:, None] & (dims < D)[None, :],
    )


@triton.jit
def tile_kernel(
    q_ptr,
    pool_ptr,
    layer_ptr,
    window_ptr,
    table_ptr,
    row_slots_ptr,
    row_positions_ptr,
    tile_starts_ptr,
    tile_num_rows_ptr,
    num_tiles_ptr,
    out_before_ptr,
    out_ptr,
    scale_log2: tl.constexpr,
    NUM_ROWS: tl.constexpr,
    NUM_SLOTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    M: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    POOL_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Prefill tiles: programs (KV head x piece of a tile's rows and query heads, tile).

    The rows of a tile and the query heads of a KV head are one axis of `TILE_ROWS * group`, row
    by row, of which a program takes `M`. Tile programs also clear the padding rows of `out`.
    """
    kv_head = tl.program_id(0) // PIECES
    piece = tl.program_id(0) % PIECES
    tile = tl.program_id(1)
    group: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    flat = piece * M + tl.arange(0, M)
    in_tile = flat // group
    heads = kv_head * group + flat % group
    dims = tl.arange(0, D_PAD)

    own = tile * TILE_ROWS + in_tile
    owned = (in_tile < TILE_ROWS) & (own < NUM_ROWS)
    padding = tl.load(row_slots_ptr + own, mask=owned, other=0) == NUM_SLOTS
    tl.store(
        out_ptr + (own * (NUM_HEADS * D) + heads * D)[:, None] + dims[None, :],
        tl.zeros([M, D_PAD], tl.float32).to(out_ptr.dtype.element_ty),
        mask=padding[:, None] & (dims < D)[None, :],
    )

    if tile >= tl.load(num_tiles_ptr):
        return
    num_rows = tl.load(tile_num_rows_ptr + tile)
    first_in_tile = piece * M // group
    if first_in_tile >= num_rows:
        return
    start = tl.load(tile_starts_ptr + tile)
    position = tl.load(row_positions_ptr + start)
    slot = tl.load(row_slots_ptr + start)
    layer = tl.load(layer_ptr).to(tl.int64)
    token_stride: tl.constexpr = 2 * NUM_KV_HEADS * D
    layer_stride: tl.constexpr = NUM_PAGES * PAGE * token_stride
    head_ptr = pool_ptr.to(tl.pointer_type(POOL_DTYPE)) + layer * layer_stride + kv_head * D
    pages_ptr = table_ptr + slot * TABLE_WIDTH

    places = ((start + in_tile) * (NUM_HEADS * D) + heads * D)[:, None] + dims[None, :]
    live = (in_tile < num_rows)[:, None] & (dims < D)[None, :]
    q = tl.load(q_ptr + places, mask=live, other=0.0)
    first_position = position + first_in_tile
    end = position + tl.minimum((piece * M + M - 1) // group, num_rows - 1) + 1
    peak = tl.full([M], MASKED, tl.float32)
    total = tl.zeros([M], tl.float32)
    acc = tl.zeros([M, D_PAD], tl.float32)
    first_key = 0
    window = 0
    if HAS_WINDOW:
        window = tl.load(window_ptr)
        first_key = tl.maximum(first_position - window + 1, 0)
        masked_from = first_key // BLOCK * BLOCK
    else:
        # Every row sees the whole blocks up to the first row's own.
        masked_from = (first_position + 1) // BLOCK * BLOCK
        peak, total, acc = _attend(
            q, position + in_tile, pages_ptr, head_ptr, 0, masked_from, 0, scale_log2, 0,
            peak, total, acc,
            PAGE, NUM_KV_HEADS, D, D_PAD, BLOCK, False, False, PRECISION,
        )  # fmt: skip
    peak, total, acc = _attend(
        q, position + in_tile, pages_ptr, head_ptr, masked_from, end, first_key, scale_log2, window,
        peak, total, acc,
        PAGE, NUM_KV_HEADS, D, D_PAD, BLOCK, True, HAS_WINDOW, PRECISION,
    )  # fmt: skip
    out = acc / total[:, None]
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def write_kernel(
    k_ptr,
    v_ptr,
    layer_ptr,
    table_ptr,
    row_slots_ptr,
    row_positions_ptr,
    pool_before_ptr,
    pool_ptr,
    NUM_SLOTS: tl.constexpr,
    NUM_PAGES: tl.constexpr,
    TABLE_WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    ROW_SIZE: tl.constexpr,
    ROW_PAD: tl.constexpr,
    POOL_DTYPE: tl.constexpr,
):
    """Keys and values `[T, ROW_SIZE]` to their places in the pool: one program a row."""
    row = tl.program_id(0)
    slot = tl.load(row_slots_ptr + row)
    if slot == NUM_SLOTS:
        return
    position = tl.load(row_positions_ptr + row)
    page_id = tl.load(table_ptr + slot * TABLE_WIDTH + position // PAGE)
    layer = tl.load(layer_ptr).to(tl.int64)
    token = (layer * NUM_PAGES + page_id) * PAGE + position % PAGE
    values = tl.arange(0, ROW_PAD)
    stored = pool_ptr.to(tl.pointer_type(POOL_DTYPE)) + token * (2 * ROW_SIZE) + values
    present = values < ROW_SIZE
    k = tl.load(k_ptr + row * ROW_SIZE + values, mask=present)
    v = tl.load(v_ptr + row * ROW_SIZE + values, mask=present)
    tl.store(stored, k.to(POOL_DTYPE), mask=present)
    tl.store(stored + ROW_SIZE, v.to(POOL_DTYPE), mask=present)
