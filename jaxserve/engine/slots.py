"""SlotState: what the device keeps of each running request between steps.

A slot is loaded when a request gets it (`load_slot`, one compiled program of
its own) and from then on only the step itself writes to it, so step k + 1 can
be dispatched before step k's tokens have reached the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jaxserve.engine.plan import SlotLoad
from jaxserve.engine.sampling_params import MAX_LOGIT_BIAS, MAX_STOP_TOKEN_IDS

# Bits of `flags`: a step skips the work that no sampled row asks for.
USES_PENALTIES = 1
USES_MASK = 2
USES_BIAS = 4
USES_MIN_TOKENS = 8
USES_LOGPROBS = 16
USES_RANDOM = 32
USES_TOP_K = 64
USES_TOP_P = 128
USES_MIN_P = 256

MAX_STOP_IDS = MAX_STOP_TOKEN_IDS + 8
"""The request's stop ids and the model's EOS ids."""

IN_PROMPT = 1 << 30
"""Bit of `token_counts` that marks a prompt token."""


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "last_token",
        "flags",
        "seed",
        "settings",
        "top_k",
        "min_position",
        "stop_ids",
        "bias_ids",
        "bias_values",
        "allowed_mask",
        "token_counts",
        "adapter",
    ],
    meta_fields=[],
)
@dataclass(frozen=True, slots=True)
class SlotState:
    """S slots; V is the vocabulary. Donated to every step."""

    last_token: jax.Array
    """int32 [S]: the token sampled last."""
    flags: jax.Array
    """int32 [S]: `USES_*` bits."""
    seed: jax.Array
    """uint32 [S, 2]: the request's 64-bit seed, a threefry key."""
    settings: jax.Array
    """float32 [S, 6]: temperature, top_p, min_p, repetition, presence and
    frequency penalty."""
    top_k: jax.Array
    """int32 [S]"""
    min_position: jax.Array
    """int32 [S]: stop ids are masked for tokens at earlier positions."""
    stop_ids: jax.Array
    """int32 [S, MAX_STOP_IDS], padded with V."""
    bias_ids: jax.Array
    """int32 [S, MAX_LOGIT_BIAS], padded with V."""
    bias_values: jax.Array
    """float32 [S, MAX_LOGIT_BIAS]"""
    allowed_mask: jax.Array
    """uint32 [S, ceil(V / 32)]: bit i of word w allows token 32 w + i."""
    token_counts: jax.Array
    """int32 [S, V]: how often a token was generated, with `IN_PROMPT`."""
    adapter: jax.Array
    """int32 [S]: the adapter's place in the pool, 0 without one."""


def empty_slots(num_slots: int, vocab_size: int) -> SlotState:
    """A zeroed state; under `jax.eval_shape`, its abstract arrays."""

    def array(dtype: DTypeLike, *shape: int) -> jax.Array:
        return jnp.zeros((num_slots, *shape), dtype)

    return SlotState(
        last_token=array(jnp.int32),
        flags=array(jnp.int32),
        seed=array(jnp.uint32, 2),
        settings=array(jnp.float32, 6),
        top_k=array(jnp.int32),
        min_position=array(jnp.int32),
        stop_ids=array(jnp.int32, MAX_STOP_IDS),
        bias_ids=array(jnp.int32, MAX_LOGIT_BIAS),
        bias_values=array(jnp.float32, MAX_LOGIT_BIAS),
        allowed_mask=array(jnp.uint32, num_mask_words(vocab_size)),
        token_counts=array(jnp.int32, vocab_size),
        adapter=array(jnp.int32),
    )


def slot_state_shapes(num_slots: int, vocab_size: int) -> SlotState:
    """The state as `jax.ShapeDtypeStruct` leaves, without computing anything."""
    shapes: SlotState = jax.eval_shape(partial(empty_slots, num_slots, vocab_size))
    return shapes


def num_mask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


@dataclass(frozen=True, slots=True)
class SlotLoadLayout:
    """Where each part of a slot load stands in one int32 vector.

    One vector is one transfer; floats and words travel as their bits.
    """

    vocab_size: int
    max_model_len: int

    def sizes(self) -> dict[str, int]:
        return {
            # slot, flags, top_k, min_position, num_prompt, num_tokens, adapter
            "scalars": 7,
            "seed": 2,
            "settings": 6,
            "stop_ids": MAX_STOP_IDS,
            "bias_ids": MAX_LOGIT_BIAS,
            "bias_values": MAX_LOGIT_BIAS,
            "allowed_mask": num_mask_words(self.vocab_size),
            "token_ids": self.max_model_len,
        }

    @property
    def size(self) -> int:
        return sum(self.sizes().values())

    def views(self, vector: np.ndarray) -> dict[str, np.ndarray]:
        """Named views of a vector `[size]`."""
        views, start = {}, 0
        for name, size in self.sizes().items():
            views[name] = vector[start : start + size]
            start += size
        return views

    def pack(self, load: SlotLoad) -> np.ndarray:
        """int32 `[size]` for `load_slot`."""
        vector = np.zeros(self.size, np.int32)
        views = self.views(vector)
        sampling = load.sampling
        prompt, output = load.prompt_token_ids, load.output_token_ids
        views["scalars"][:] = (
            load.slot,
            slot_flags(load),
            sampling.top_k,
            len(prompt) + sampling.min_tokens,
            len(prompt),
            len(prompt) + len(output),
            load.adapter_index,
        )
        views["seed"].view(np.uint32)[:] = (load.seed >> 32, load.seed & 0xFFFFFFFF)
        views["settings"].view(np.float32)[:] = (
            sampling.temperature,
            sampling.top_p,
            sampling.min_p,
            sampling.repetition_penalty,
            sampling.presence_penalty,
            sampling.frequency_penalty,
        )
        for name, ids in (("stop_ids", load.stop_token_ids), ("bias_ids", ())):
            views[name][:] = self.vocab_size
            views[name][: len(ids)] = ids
        if sampling.logit_bias:
            ids, values = zip(*sampling.logit_bias, strict=True)
            views["bias_ids"][: len(ids)] = ids
            views["bias_values"].view(np.float32)[: len(ids)] = values
        views["allowed_mask"].view(np.uint32)[:] = self._allowed_words(load)
        views["token_ids"][: len(prompt)] = prompt
        views["token_ids"][len(prompt) : len(prompt) + len(output)] = output
        return vector

    def _allowed_words(self, load: SlotLoad) -> np.ndarray:
        sampling = load.sampling
        bits = np.zeros(num_mask_words(self.vocab_size) * 32, np.uint8)
        if sampling.allowed_token_ids is None:
            bits[:] = 1
        else:
            bits[list(sampling.allowed_token_ids)] = 1
        bits[list(sampling.bad_token_ids)] = 0
        return np.packbits(bits, bitorder="little").view("<u4")


def slot_flags(load: SlotLoad) -> int:
    """The `USES_*` bits of a request."""
    sampling = load.sampling
    uses = (
        (
            USES_MASK,
            sampling.allowed_token_ids is not None
            or bool(sampling.bad_token_ids)
            or sampling.constraint is not None,
        ),
        (USES_BIAS, bool(sampling.logit_bias)),
        (USES_MIN_TOKENS, sampling.min_tokens > 0 and bool(load.stop_token_ids)),
        (USES_LOGPROBS, sampling.logprobs is not None or sampling.prompt_logprobs is not None),
        (
            USES_PENALTIES,
            sampling.repetition_penalty != 1.0
            or sampling.presence_penalty != 0.0
            or sampling.frequency_penalty != 0.0,
        ),
        (USES_RANDOM, not sampling.is_greedy),
        (USES_TOP_K, not sampling.is_greedy and sampling.top_k > 0),
        (USES_TOP_P, not sampling.is_greedy and sampling.top_p < 1.0),
        (USES_MIN_P, not sampling.is_greedy and sampling.min_p > 0.0),
    )
    return sum(bit for bit, used in uses if used)


def load_slot(slots: SlotState, vector: jax.Array, *, layout: SlotLoadLayout) -> SlotState:
    """Writes one slot from `layout.pack(load)`; `slots` is donated."""
    parts, start = {}, 0
    for name, size in layout.sizes().items():
        parts[name] = lax.slice_in_dim(vector, start, start + size)
        start += size
    slot, flags, top_k, min_position, num_prompt, num_tokens, adapter = (
        parts["scalars"][i] for i in range(7)
    )
    order = jnp.arange(layout.max_model_len)
    token_ids = parts["token_ids"]
    drop = layout.vocab_size
    counts = jnp.zeros(layout.vocab_size, jnp.int32)
    counts = counts.at[jnp.where(order < num_prompt, token_ids, drop)].set(IN_PROMPT, mode="drop")
    is_output = (order >= num_prompt) & (order < num_tokens)
    counts = counts.at[jnp.where(is_output, token_ids, drop)].add(1, mode="drop")
    as_float = partial(lax.bitcast_convert_type, new_dtype=jnp.float32)
    as_word = partial(lax.bitcast_convert_type, new_dtype=jnp.uint32)
    return SlotState(
        # The first row of a loaded slot is always a prefill row.
        last_token=slots.last_token.at[slot].set(0),
        flags=slots.flags.at[slot].set(flags),
        seed=slots.seed.at[slot].set(as_word(parts["seed"])),
        settings=slots.settings.at[slot].set(as_float(parts["settings"])),
        top_k=slots.top_k.at[slot].set(top_k),
        min_position=slots.min_position.at[slot].set(min_position),
        stop_ids=slots.stop_ids.at[slot].set(parts["stop_ids"]),
        bias_ids=slots.bias_ids.at[slot].set(parts["bias_ids"]),
        bias_values=slots.bias_values.at[slot].set(as_float(parts["bias_values"])),
        allowed_mask=slots.allowed_mask.at[slot].set(as_word(parts["allowed_mask"])),
        token_counts=slots.token_counts.at[slot].set(counts),
        adapter=slots.adapter.at[slot].set(adapter),
    )
