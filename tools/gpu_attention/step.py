"""One layer's attention of a case of `tools.attention_cases`, by the Triton kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.attention.triton_attention import TritonAttention
from models.ops.attention.triton_call import triton_call
from models.ops.attention.work import AttentionTiling, AttentionWork
from tools.attention_cases import Case, Inputs


def make_attention(capability: int, compiled_for: int | None = None) -> TritonAttention:
    """The op for a GPU of `capability`, its kernels compiled for an older one if asked."""
    if compiled_for is None:
        return TritonAttention(capability)
    call = partial(triton_call, device_capability=capability)
    return TritonAttention(compiled_for, call=call)


Step = Callable[..., tuple[jax.Array, jax.Array]]


def run_case(
    attention: TritonAttention, case: Case, inputs: Inputs
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the step's rows and attends; see `attention_cases.Runner`."""
    return run_step(
        jax.jit(partial(write_and_attend, attention, case, inputs.tiling)), case, inputs
    )


def run_eagerly(
    attention: TritonAttention, case: Case, inputs: Inputs
) -> tuple[np.ndarray, np.ndarray]:
    """As `run_case`, outside of XLA: the op's `call` gets arrays with values."""

    def step(*arrays: np.ndarray | AttentionWork) -> tuple[jax.Array, jax.Array]:
        on_device = jax.tree.map(jnp.asarray, arrays)
        return write_and_attend(attention, case, inputs.tiling, *on_device)

    return run_step(step, case, inputs)


def run_step(step: Step, case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """`step` on the arrays of a case; see `attention_cases.Runner`."""
    layer, window = np.int32(inputs.layer), np.int32(case.window or 0)
    out, pool = step(inputs.q, inputs.k, inputs.v, inputs.pool, layer, window, inputs.work)
    return np.asarray(out.astype(jnp.float32)), np.asarray(pool)


def write_and_attend(
    attention: TritonAttention,
    case: Case,
    tiling: AttentionTiling,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    pool: jax.Array,
    layer: jax.Array,
    window: jax.Array,
    work: AttentionWork,
) -> tuple[jax.Array, jax.Array]:
    """What a layer of a step does: keys and values to the pool, then attention."""
    dtype = jnp.dtype(case.dtype)
    prepared = attention.prepare(work, tiling=tiling, dtype=dtype, head_dim=case.head_dim)
    pool = attention.write(pool, k, v, layer, prepared)
    sliding = window if case.is_window_traced else case.window
    return attention(q, pool, layer, prepared, tiling=tiling, sliding_window=sliding), pool
