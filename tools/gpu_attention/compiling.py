"""All kernels that the parts need, compiled side by side; needs no GPU."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.attention.triton_attention import TritonAttention
from models.ops.attention.triton_call import KernelConfig, compile_kernel, kernel_types
from tools import attention_cases
from tools.attention_cases import BATTERY
from tools.gpu_attention.checks import SHORT_BATTERY
from tools.gpu_attention.loads import (
    CHUNK,
    HEAD_DIM,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_PAGES,
    NUM_SLOTS,
    PAGE,
    layers,
    make_work,
)
from tools.gpu_attention.step import write_and_attend
from tools.gpu_attention.timings import DECODE_CONFIGS, TILE_CONFIGS


def compile_all(capability: int, parts: Sequence[str], num_workers: int) -> None:
    """Fills Triton's cache with all kernels that the parts need, in parallel, without a GPU."""
    jax.config.update("jax_platforms", "cpu")
    wanted = kernels_wanted(capability, parts)
    begun = perf_counter()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(wanted)), context) as pool:
        futures = [pool.submit(compile_kernel, *kernel) for kernel in wanted]
        for future in as_completed(futures):
            future.result()
    print(f"{len(wanted)} kernels in {perf_counter() - begun:.1f} s", flush=True)


def kernels_wanted(capability: int, parts: Sequence[str]) -> list[tuple[Any, ...]]:
    """Arguments of `compile_kernel`, each once, by tracing the parts with abstract values."""
    wanted: dict[tuple[Any, ...], None] = {}

    def record(
        kernel: str,
        arrays: Sequence[jax.Array],
        out_types: Sequence[jax.ShapeDtypeStruct],
        *,
        constants: dict[str, Any],
        config: KernelConfig,
        compute_capability: int,
        **_: Any,
    ) -> list[jax.Array]:
        types = kernel_types([*arrays, *out_types])
        key = (kernel, types, tuple(sorted(constants.items())), config, compute_capability)
        wanted[key] = None
        return [jnp.zeros(out.shape, out.dtype) for out in out_types]

    for part in parts:
        if part in ("battery", "sm80"):
            attention = TritonAttention(80 if part == "sm80" else capability, call=record)
            for case in BATTERY:
                if part == "sm80" and case.name not in SHORT_BATTERY:
                    continue
                tiling = attention.tiling(case.page_size, case.num_heads, case.num_kv_heads)
                inputs = attention_cases.build(case, tiling, np.random.default_rng(0))
                trace = partial(write_and_attend, attention, case, tiling)
                scalar = jax.ShapeDtypeStruct((), jnp.int32)
                arrays = (inputs.q, inputs.k, inputs.v, inputs.pool)
                jax.eval_shape(trace, *arrays, scalar, scalar, inputs.work)
        configs = {"decode": DECODE_CONFIGS, "prefill": TILE_CONFIGS}.get(part, ())
        for config in configs:
            attention = TritonAttention(capability, config, record)
            tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
            num_rows = NUM_SLOTS if part == "decode" else CHUNK
            num_layers = NUM_LAYERS if part == "decode" else 8
            shape = (num_layers, NUM_PAGES + 1, PAGE, 2, NUM_KV_HEADS, HEAD_DIM)
            jax.eval_shape(
                partial(layers, attention, tiling, num_layers=1),
                jax.ShapeDtypeStruct((num_rows, NUM_HEADS, HEAD_DIM), jnp.bfloat16),
                jax.ShapeDtypeStruct(shape, jnp.uint16),
                make_work(tiling, num_rows, [], []),
            )
    return list(wanted)
