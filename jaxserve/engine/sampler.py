"""The sampler: logits of the sampled rows in, one token per row out.

Nothing sorts the vocabulary. Top-k and top-p become a threshold on the
probability, found by bisection over its bits (exact, 30 counting passes); a
token is then drawn by inverting the cumulative distribution in two levels
with a single uniform number. Work that no row of the step asks for is skipped
by a `cond`, and every row's result depends on that row alone, so it is the
same whichever branch its neighbours need.

RNG key of a token = (request seed, absolute position), never step or slot.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from jaxserve.engine import slots as slot_flags
from jaxserve.engine.sampling_params import MAX_TOP_LOGPROBS
from jaxserve.engine.slots import IN_PROMPT, SlotState

CDF_BLOCK = 256
"""Vocabulary entries of one block of the two-level search."""

FindPeaks = Callable[[jax.Array], tuple[jax.Array, jax.Array]]
"""Of float32 `[N, V]`, see `row_peaks`."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class SampleOutput:
    """N rows; fields as in `StepResults`."""

    token_ids: jax.Array
    logprobs: jax.Array
    ranks: jax.Array
    top_ids: jax.Array
    top_logprobs: jax.Array


def sample(
    logits: jax.Array,
    slots: SlotState,
    row_slots: jax.Array,
    positions: jax.Array,
    targets: jax.Array,
    find_peaks: FindPeaks | None = None,
) -> SampleOutput:
    """Draws the next token of each row.

    Args:
        logits: float32 `[N, V]`, raw.
        slots: the settings of every slot.
        row_slots: int32 `[N]`; any valid slot for padding rows.
        positions: int32 `[N]`: absolute position of the token to be drawn.
        targets: int32 `[N]`: -1 draws; -2 marks padding; otherwise this token
            is returned and scored (prompt logprobs).
        find_peaks: by default `row_peaks`.

    Returns:
        Token ids int32 `[N]` and the raw logits' logprobs (zeros when no row
        wants any).
    """
    flags = jnp.where(targets > -2, slots.flags[row_slots], 0)
    draws = jnp.where(targets == -1, flags, 0)
    adjusted = _adjust(logits, slots, row_slots, positions, draws)
    greedy, _ = (find_peaks or row_peaks)(adjusted)
    sampled = lax.cond(
        _any(draws, slot_flags.USES_RANDOM),
        lambda: _draw(adjusted, slots, row_slots, positions, draws),
        lambda: greedy,
    )
    is_random = (draws & slot_flags.USES_RANDOM) != 0
    tokens = jnp.where(is_random, sampled, greedy)
    tokens = jnp.where(targets >= 0, targets, tokens)
    logprobs, ranks, top_ids, top_logprobs = lax.cond(
        _any(flags, slot_flags.USES_LOGPROBS),
        lambda: _logprobs(logits, tokens),
        lambda: _no_logprobs(logits),
    )
    return SampleOutput(tokens, logprobs, ranks, top_ids, top_logprobs)


def _any(flags: jax.Array, bit: int) -> jax.Array:
    return jnp.any((flags & bit) != 0)


def row_peaks(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index of each row's maximum, int32 `[N]`, and whether the row is finite, bool `[N]`."""
    return _argmax(x), jnp.isfinite(x.max(-1)) & jnp.isfinite(x.min(-1))


def _argmax(x: jax.Array) -> jax.Array:
    """First index of the maximum `[N]`; two plain reductions vectorise better
    than an argmax."""
    index = lax.broadcasted_iota(jnp.int32, x.shape, 1)
    peak = x.max(-1, keepdims=True)
    return jnp.where(x == peak, index, x.shape[1] - 1).min(-1)


def _adjust(
    logits: jax.Array,
    slots: SlotState,
    row_slots: jax.Array,
    positions: jax.Array,
    flags: jax.Array,
) -> jax.Array:
    """Masks, bias and penalties; each behind a `cond` of its own."""

    def when(bit: int, change: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        uses = ((flags & bit) != 0)[:, None]
        changed: jax.Array = lax.cond(
            _any(flags, bit), lambda x: jnp.where(uses, change(x), x), lambda x: x, x
        )
        return changed

    rows = jnp.arange(logits.shape[0])[:, None]
    minus_infinity = jnp.finfo(jnp.float32).min

    def mask(x: jax.Array) -> jax.Array:
        words = slots.allowed_mask[row_slots]
        bits = (words[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
        allowed = bits.reshape(words.shape[0], -1)[:, : x.shape[1]] != 0
        return jnp.where(allowed, x, minus_infinity)

    def hold_back_stop_ids(x: jax.Array) -> jax.Array:
        early = positions < slots.min_position[row_slots]
        ids = jnp.where(early[:, None], slots.stop_ids[row_slots], x.shape[1])
        return x.at[rows, ids].set(minus_infinity, mode="drop")

    def bias(x: jax.Array) -> jax.Array:
        return x.at[rows, slots.bias_ids[row_slots]].add(slots.bias_values[row_slots], mode="drop")

    def penalise(x: jax.Array) -> jax.Array:
        counts = slots.token_counts[row_slots]
        generated = (counts & (IN_PROMPT - 1)).astype(jnp.float32)
        repetition, presence, frequency = (slots.settings[row_slots, i][:, None] for i in (3, 4, 5))
        repeated = jnp.where(x > 0, x / repetition, x * repetition)
        x = jnp.where(counts > 0, repeated, x)
        return x - frequency * generated - presence * (generated > 0)

    logits = when(slot_flags.USES_BIAS, bias, logits)
    logits = when(slot_flags.USES_PENALTIES, penalise, logits)
    logits = when(slot_flags.USES_MASK, mask, logits)
    return when(slot_flags.USES_MIN_TOKENS, hold_back_stop_ids, logits)


def _draw(
    logits: jax.Array,
    slots: SlotState,
    row_slots: jax.Array,
    positions: jax.Array,
    flags: jax.Array,
) -> jax.Array:
    """Samples `[N]` tokens after temperature, top-k, top-p and min-p."""
    temperature, top_p, min_p = (slots.settings[row_slots, i][:, None] for i in range(3))
    temperature = jnp.where(temperature > 0, temperature, 1.0)
    peak = logits.max(-1, keepdims=True)
    # In (0, 1] and monotone in the logits: the most likely token weighs 1.
    weights = jnp.exp((logits - peak) / temperature)
    top_k = jnp.where(slots.top_k[row_slots] > 0, slots.top_k[row_slots], logits.shape[1])

    def keep(bit: int, threshold: Callable[[jax.Array], jax.Array], w: jax.Array) -> jax.Array:
        uses = ((flags & bit) != 0)[:, None]
        kept: jax.Array = lax.cond(
            _any(flags, bit),
            lambda w: jnp.where(uses & (w < threshold(w)), 0.0, w),
            lambda w: w,
            w,
        )
        return kept

    weights = keep(
        slot_flags.USES_TOP_K,
        lambda w: _largest_threshold(w, lambda kept: kept.sum(-1, dtype=jnp.int32) >= top_k),
        weights,
    )
    weights = keep(
        slot_flags.USES_TOP_P,
        lambda w: _largest_threshold(
            w,
            lambda kept: jnp.where(kept, w, 0.0).sum(-1) >= top_p[:, 0] * w.sum(-1),
        ),
        weights,
    )
    weights = keep(slot_flags.USES_MIN_P, lambda w: jnp.broadcast_to(min_p, w.shape), weights)
    return _invert_cdf(weights, _uniform(slots.seed[row_slots], positions))


def _largest_threshold(
    weights: jax.Array, is_enough: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """Largest t `[N, 1]` for which keeping `weights >= t` is enough.

    Bisection over the bits of a float in [0, 1], which order as integers, so
    that the threshold is exact: ties of the last token kept are kept too.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int32)
    num_rows = weights.shape[0]
    one = jnp.full(num_rows, 0x3F800000, jnp.int32)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # enough at low, not enough above high
        middle = low + (high - low + 1) // 2
        enough = is_enough(bits >= middle[:, None])
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle - 1)

    low, _ = lax.fori_loop(0, 30, halve, (jnp.zeros_like(one), one))
    return lax.bitcast_convert_type(low, jnp.float32)[:, None]


def _uniform(seeds: jax.Array, positions: jax.Array) -> jax.Array:
    """One float in [0, 1) per row, from (seed `[N, 2]`, position `[N]`)."""

    def one(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed, impl="threefry2x32")
        return jax.random.uniform(jax.random.fold_in(key, position))

    return jax.vmap(one)(seeds, positions)


def _invert_cdf(weights: jax.Array, uniform: jax.Array) -> jax.Array:
    """Index drawn in proportion to `weights [N, V]` (not normalised).

    First the block of `CDF_BLOCK` entries, then the entry in it.
    """
    num_rows, vocab_size = weights.shape
    padding = -vocab_size % CDF_BLOCK
    blocks = jnp.pad(weights, ((0, 0), (0, padding))).reshape(num_rows, -1, CDF_BLOCK)
    sums = blocks.sum(-1)
    block, left = _find(sums, uniform * sums.sum(-1))
    entries = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    entry, _ = _find(entries, left)
    return block * CDF_BLOCK + entry


def _find(mass: jax.Array, goal: jax.Array) -> tuple[jax.Array, jax.Array]:
    """First index whose cumulative `mass [N, M]` exceeds `goal [N]`, and what
    is left of the goal inside that entry. Rounding never picks an entry
    without mass."""
    cumulative = jnp.cumsum(mass, axis=-1)
    index = (cumulative <= goal[:, None]).sum(-1, dtype=jnp.int32)
    position = lax.broadcasted_iota(jnp.int32, mass.shape, 1)
    last = jnp.where(mass > 0, position, 0).max(-1)
    index = jnp.minimum(index, last)
    below = jnp.where(position < index[:, None], mass, 0.0).sum(-1)
    return index, jnp.maximum(goal - below, 0.0)


def _logprobs(
    logits: jax.Array, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    num_top = min(MAX_TOP_LOGPROBS, logits.shape[1])
    norm = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=1)
    rank = (logits >= chosen).sum(-1, dtype=jnp.int32)
    top_logits, top_ids = lax.top_k(logits, num_top)
    return (chosen - norm)[:, 0], rank, top_ids, top_logits - norm


def _no_logprobs(logits: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    num_rows, num_top = logits.shape[0], min(MAX_TOP_LOGPROBS, logits.shape[1])
    return (
        jnp.zeros(num_rows, jnp.float32),
        jnp.zeros(num_rows, jnp.int32),
        jnp.zeros((num_rows, num_top), jnp.int32),
        jnp.zeros((num_rows, num_top), jnp.float32),
    )
