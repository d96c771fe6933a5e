"""Weights in 8 or 4 bits: kernels as integers and scales, multiplied without a copy in full.

int8 has one scale for each output channel, so the product is scaled after the sum. int4 has one
for each group of `INT4_GROUP` inputs of a channel, two codes a byte. Both round to the nearest
code, symmetrically around zero (Dettmers et al., "LLM.int8()", 2022, section 2; Frantar et al.,
"GPTQ", 2022, whose round-to-nearest baseline this is).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from models.ops.precision import matmul_precision

FORMATS = ("int8", "int4")
INT4_GROUP = 32
INT8_LIMIT = 127
INT4_LIMIT = 7
INT4_ZERO = 8
"""The code of weight 0, so that codes are not negative."""


def quantize(
    kernel: npt.NDArray[np.floating], weight_format: str
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.float32]]:
    """Codes and scales of kernels.

    Args:
        kernel: `[..., in, out]`, finite; `in` is a multiple of `INT4_GROUP` for int4.
        weight_format: one of `FORMATS`.

    Returns:
        int8: `(int8 [..., in, out], float32 [..., out])`.
        int4: `(uint8 [..., in / 2, out], float32 [..., in / INT4_GROUP, out])`; the low four bits
        are the first half of the inputs.
    """
    values = np.asarray(kernel, np.float32)
    if weight_format == "int8":
        scales = _scales(values, INT8_LIMIT)
        codes = np.rint(values / scales[..., None, :]).astype(np.int8)
        return codes, scales
    *stacked, num_in, num_out = values.shape
    groups = values.reshape(*stacked, num_in // INT4_GROUP, INT4_GROUP, num_out)
    scales = _scales(groups, INT4_LIMIT)
    rounded = np.rint(groups / scales[..., None, :]).astype(np.int8) + INT4_ZERO
    codes = rounded.astype(np.uint8).reshape(values.shape)
    low, high = codes[..., : num_in // 2, :], codes[..., num_in // 2 :, :]
    return low | (high << 4), scales


def _scales(values: npt.NDArray[np.float32], limit: int) -> npt.NDArray[np.float32]:
    """What the largest code stands for, over the axis before the last; 1 where all are zero."""
    largest = np.abs(values).max(axis=-2)
    return np.where(largest > 0, largest / np.float32(limit), np.float32(1.0)).astype(np.float32)


def dequantize(codes: jax.Array, scales: jax.Array) -> jax.Array:
    """The kernel `float32 [in, out]` of one layer's codes and scales, of either format."""
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) * scales
    num_groups, num_out = scales.shape
    unpacked = jnp.concatenate([codes & 15, codes >> 4], axis=0).astype(jnp.float32) - INT4_ZERO
    groups = unpacked.reshape(num_groups, INT4_GROUP, num_out) * scales[:, None, :]
    return groups.reshape(-1, num_out)


def quantized_matmul(x: jax.Array, codes: jax.Array, scales: jax.Array) -> jax.Array:
    """`x [T, in]` times the kernel, `[T, out]` in the dtype of `x`."""
    precision = matmul_precision(x.dtype)
    if codes.dtype == jnp.int8:
        # Codes are exact in every float dtype; the sum is scaled once.
        product = jnp.matmul(
            x, codes.astype(x.dtype), precision=precision, preferred_element_type=jnp.float32
        )
        return (product * scales).astype(x.dtype)
    kernel = dequantize(codes, scales).astype(x.dtype)
    return jnp.matmul(x, kernel, precision=precision)
