"""How near the Triton attention is to the hardware, with several sizes of program."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp

from models.ops.attention.kv_pool import write_rows
from models.ops.attention.triton_attention import DEFAULT, TritonAttention, TritonConfig
from models.ops.attention.triton_call import KernelConfig
from models.ops.attention.work import AttentionWork
from tools.gpu_attention.loads import (
    CHUNK,
    HEAD_DIM,
    MAX_CONTEXT,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_PAGES,
    NUM_SLOTS,
    PAGE,
    layers,
    make_work,
    queries,
    random_pool,
)


def _decode_config(block: int, warps: int, stages: int, split: int) -> TritonConfig:
    return dataclasses.replace(
        DEFAULT, decode_block=block, decode=KernelConfig(warps, stages), split_keys=split
    )


def _tile_config(rows: int, block: int, warps: int, stages: int) -> TritonConfig:
    return dataclasses.replace(
        DEFAULT, tile_rows=rows, tile_block=block, tile=KernelConfig(warps, stages)
    )


DECODE_CONFIGS = (
    DEFAULT,
    _decode_config(64, 2, 5, 512),
    _decode_config(32, 2, 5, 512),
    _decode_config(64, 4, 5, 512),
)
TILE_CONFIGS = (
    DEFAULT,
    _tile_config(64, 64, 4, 4),
    _tile_config(64, 128, 4, 3),
    _tile_config(128, 64, 8, 3),
)


def _seconds(run: Callable[[], Any], repeats: int = 7, batch: int = 4) -> float:
    """Median time of one call, `batch` calls dispatched at once."""
    jax.block_until_ready(run())
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        begin = perf_counter()
        jax.block_until_ready([run() for _ in range(batch)])
        times.append((perf_counter() - begin) / batch)
    return median(times)


def copy_bytes_per_s() -> float:
    """Bytes read and written by a copy of 4 GiB, in words of 4 bytes: XLA's copy of narrower
    ones is slower than the memory."""
    source = jnp.arange(2**30, dtype=jnp.int32)
    copy = jax.jit(lambda x: jnp.array(x, copy=True))
    return 2 * source.nbytes / _seconds(lambda: copy(source), batch=2)


def matmul_flops() -> float:
    """Operations per second of a large bfloat16 product."""
    size = 8192
    x = jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(2), (size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / _seconds(lambda: multiply(x, y))


def _name(config: TritonConfig, kind: str) -> str:
    if kind == "decode":
        kernel, sizes = config.decode, f"block {config.decode_block} split {config.split_keys}"
    else:
        kernel, sizes = config.tile, f"rows {config.tile_rows} block {config.tile_block}"
    return f"{sizes} warps {kernel.num_warps} stages {kernel.num_stages}"


DECODE_LOADS = {
    "64 x 1k": [1024] * 64,
    "64 x 1030": [1030] * 64,
    "8 x 8k": [8192] * 8,
    "1 x 8k": [8192],
    "mixed": [8192, 6000, 4096, 4096, 3000] + [1500] * 10 + [500] * 30,
}


def time_decodes(capability: int) -> dict[str, Any]:
    """Share of the copy bandwidth, by sizes of program and load."""
    rate = copy_bytes_per_s()
    results: dict[str, Any] = {"copy": f"{rate / 1e12:.2f} TB/s"}
    pool = random_pool(NUM_PAGES, NUM_LAYERS)
    q = queries(NUM_SLOTS)
    for config in DECODE_CONFIGS:
        attention = TritonAttention(capability, config)
        tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
        run = jax.jit(partial(layers, attention, tiling, num_layers=NUM_LAYERS))
        line = []
        for name, contexts in DECODE_LOADS.items():
            work = make_work(tiling, NUM_SLOTS, contexts, [])
            seconds = _seconds(partial(run, q, pool, work)) / NUM_LAYERS
            num_bytes = sum(contexts) * 2 * NUM_KV_HEADS * HEAD_DIM * 2
            line.append(f"{name}: {seconds * 1e6:.0f} us {100 * num_bytes / seconds / rate:.0f} %")
        nothing = make_work(tiling, NUM_SLOTS, [], [])
        idle = _seconds(partial(run, q, pool, nothing)) / NUM_LAYERS
        results[_name(config, "decode")] = ", ".join([*line, f"idle: {idle * 1e6:.1f} us"])
        print("decode", _name(config, "decode"), results[_name(config, "decode")], flush=True)
    return results


PREFILL_LOADS = {
    "512 of 512": [(0, CHUNK)],
    "512 of 8k": [(MAX_CONTEXT - CHUNK, CHUNK)],
    "4 x 128": [(0, 128)] * 4,
}


def time_prefills(capability: int) -> dict[str, Any]:
    """Share of a matrix product's rate (only pairs that are seen count), by sizes and load."""
    rate = matmul_flops()
    results: dict[str, Any] = {"matmul": f"{rate / 1e12:.0f} TFLOP/s"}
    num_layers = 8
    pool = random_pool(NUM_PAGES, num_layers)
    q = queries(CHUNK)
    for config in TILE_CONFIGS:
        attention = TritonAttention(capability, config)
        tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
        run = jax.jit(partial(layers, attention, tiling, num_layers=num_layers))
        line = []
        for name, chunks in PREFILL_LOADS.items():
            work = make_work(tiling, CHUNK, [], chunks)
            seconds = _seconds(partial(run, q, pool, work)) / num_layers
            pairs = sum(rows * start + rows * (rows + 1) / 2 for start, rows in chunks)
            flops = 4 * pairs * NUM_HEADS * HEAD_DIM
            line.append(f"{name}: {seconds * 1e6:.0f} us {100 * flops / seconds / rate:.0f} %")
        results[_name(config, "tile")] = ", ".join(line)
        print("prefill", _name(config, "tile"), results[_name(config, "tile")], flush=True)
    return results


def time_writes(capability: int) -> dict[str, Any]:
    """A layer's write of keys and values: the kernel and XLA's scatter, pool donated."""
    attention = TritonAttention(capability)
    tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
    results: dict[str, Any] = {}
    for num_rows in (NUM_SLOTS, CHUNK):
        work = make_work(tiling, num_rows, [1000] * NUM_SLOTS, [])
        rows = (num_rows, NUM_KV_HEADS, HEAD_DIM)
        k = jax.random.normal(jax.random.key(5), rows, jnp.bfloat16)

        def kernel(
            pool: jax.Array, k: jax.Array, work: AttentionWork
        ) -> tuple[jax.Array, jax.Array]:
            prepared = attention.prepare(
                work, tiling=tiling, dtype=jnp.dtype(jnp.bfloat16), head_dim=HEAD_DIM
            )
            for layer in range(NUM_LAYERS):
                pool = attention.write(pool, k, k, jnp.int32(layer), prepared)
            return pool, pool[0, 0, 0, 0, 0, 0]

        def scatter(
            pool: jax.Array, k: jax.Array, work: AttentionWork
        ) -> tuple[jax.Array, jax.Array]:
            for layer in range(NUM_LAYERS):
                pool = write_rows(pool, k, k, jnp.int32(layer), work)
            return pool, pool[0, 0, 0, 0, 0, 0]

        for name, function in (("kernel", kernel), ("XLA scatter", scatter)):
            pool = random_pool(NUM_PAGES, NUM_LAYERS)
            compiled = jax.jit(function, donate_argnums=0).lower(pool, k, work).compile()
            memory = compiled.memory_analysis()
            times = []
            for _ in range(8):
                begin = perf_counter()
                for _ in range(4):
                    pool, probe = compiled(pool, k, work)
                probe.block_until_ready()
                times.append((perf_counter() - begin) / 4 / NUM_LAYERS)
            temp = 0 if memory is None else memory.temp_size_in_bytes
            results[f"{num_rows} rows, {name}"] = (
                f"{median(times[2:]) * 1e6:.1f} us a layer, {temp / 2**20:.0f} MiB of temporaries"
            )
            del pool
    return results
