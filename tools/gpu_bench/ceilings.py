"""What the card does at best: copying, reading, and multiplying matrices."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from tools.gpu_bench.case import Case, random_like, seconds_of


def measure(case: Case) -> dict[str, Any]:
    """Rates of large arrays through XLA; a copy counts the bytes read and those written."""
    is_toy = case.config.hidden_size < 1024
    num_values = 2**18 if is_toy else 2**30
    values = jnp.arange(num_values, dtype=jnp.int32)
    copy = jax.jit(lambda a: jnp.array(a, copy=True))
    total = jax.jit(lambda a: a.astype(jnp.float32).sum())
    copied_s = seconds_of(lambda: copy(values))
    read_s = seconds_of(lambda: total(values))
    size = 128 if is_toy else 8192
    shape = jax.ShapeDtypeStruct((size, size), jnp.bfloat16)
    a, b = random_like(shape, 1), random_like(shape, 2)
    product = jax.jit(jnp.matmul)
    product_s = seconds_of(lambda: product(a, b))
    return {
        "copy_bytes_per_s": 8 * num_values / copied_s,
        "read_bytes_per_s": 4 * num_values / read_s,
        "matmul_flop_per_s": 2 * size**3 / product_s,
    }
