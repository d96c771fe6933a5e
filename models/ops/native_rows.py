"""What the native kernels compute of single rows: XLA computes all rows of a bucket, and its
activations and searches for a maximum take several times as long as the products of a few rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

NATIVE_GATES = ("silu", "gelu_tanh")
"""Of `models.ops.activation.ACTIVATIONS`."""


def native_gate(
    gate_up: jax.Array, activation: str, num_live: jax.Array | int | None = None
) -> jax.Array:
    """`activation(gate) * up`, computed in float32.

    Args:
        gate_up: `[T, 2 F]`, gate and up side by side, float32 or bfloat16.
        activation: one of `NATIVE_GATES`.
        num_live: rows from here on become zeros; by default there are none.

    Returns:
        `[T, F]` in the dtype of `gate_up`.
    """
    num_rows, width = gate_up.shape
    call = jax.ffi.ffi_call(
        "jaxserve_gate", jax.ShapeDtypeStruct((num_rows, width // 2), gate_up.dtype)
    )
    live = jnp.asarray(num_rows if num_live is None else num_live, jnp.int32)
    gated: jax.Array = call(gate_up, live, is_gelu=np.bool_(activation == "gelu_tanh"))
    return gated


def native_peaks(x: jax.Array, num_live: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """The largest value of each row.

    Args:
        x: float32 `[N, V]`.
        num_live: rows from here on are not looked at.

    Returns:
        Index of its first place, int32 `[N]`, and whether all values of the row are finite,
        bool `[N]`. Where one is NaN, the index is any; of rows past the live ones both are 0.
    """
    rows = jax.ShapeDtypeStruct((x.shape[0],), jnp.int32)
    call = jax.ffi.ffi_call("jaxserve_peaks", (rows, rows))
    indices, are_finite = call(x, jnp.asarray(num_live, jnp.int32))
    return indices, are_finite != 0
