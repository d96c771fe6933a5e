"""What is measured: Llama-3-8B's shape with random weights, or a toy of it for a dry run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import ModelConfig

LLAMA_3_8B = ModelConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rope_theta=500000.0,
)
TOY = ModelConfig(
    family="llama",
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=512,
)


@dataclass(frozen=True, slots=True)
class Case:
    """Sizes of one run of the bench."""

    config: ModelConfig
    decodes: tuple[tuple[int, int], ...]
    """(sequences, context) of each decode step."""
    hybrid: tuple[int, int, int]
    """Decodes, their context, and rows of the bucket that a prompt's chunk fills."""
    buckets: tuple[int, ...]
    max_num_seqs: int
    max_model_len: int
    pool_tokens: int
    """KV cache of the step measurements."""
    num_requests: int
    """Of the throughput comparison."""
    workload: str = "azure_conv"
    """Lengths of its requests, see `jaxserve.simulator.workloads`."""
    max_request_tokens: int = 2048
    """Prompt and output of its longest request."""


GPU = Case(
    config=LLAMA_3_8B,
    decodes=((1, 1024), (8, 1024), (8, 8192 - 64), (64, 1024), (128, 1024)),
    hybrid=(64, 1024, 512),
    buckets=(8, 64, 128, 512),
    max_num_seqs=128,
    max_model_len=8192,
    pool_tokens=140 * 1024,
    num_requests=256,
)
DRY = Case(
    config=TOY,
    decodes=((1, 64), (4, 64), (8, 128)),
    hybrid=(4, 64, 32),
    buckets=(4, 8, 32),
    max_num_seqs=8,
    max_model_len=256,
    pool_tokens=2048,
    num_requests=6,
    max_request_tokens=200,
)


def random_params(shapes: Any) -> Any:
    """Small random values of these shapes, drawn on the device leaf by leaf.

    Norms' scales are ones, so that activations keep their size through the layers.
    """

    def draw(path: Any, shape: jax.ShapeDtypeStruct) -> jax.Array:
        if path[-1].key == "scale" and "norm" in jax.tree_util.keystr(path):
            return jnp.ones(shape.shape, shape.dtype)
        return random_like(shape, seed=len(jax.tree_util.keystr(path)))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_like(shape: jax.ShapeDtypeStruct, seed: int) -> jax.Array:
    """Normal values with standard deviation 0.02."""
    drawn: jax.Array = _draw(jax.random.key(seed, impl="rbg"), shape.shape, shape.dtype)
    return drawn


@partial(jax.jit, static_argnums=(1, 2))
def _draw(key: jax.Array, shape: tuple[int, ...], dtype: np.dtype) -> jax.Array:
    return 0.02 * jax.random.normal(key, shape, dtype)


def seconds_of(run: Callable[[], Any], *, calls: int = 10, repeats: int = 5) -> float:
    """Median seconds of one call among several in a row; `run` returns arrays to wait for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = perf_counter()
        for _ in range(calls):
            out = run()
        jax.block_until_ready(out)
        times.append((perf_counter() - start) / calls)
    return median(times)


def num_bytes(tree: Any) -> int:
    """Of a pytree of arrays or shapes."""
    return sum(
        int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree)
    )
