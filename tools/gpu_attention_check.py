"""The Triton attention on this machine's GPU: is it right, and how near is it to the hardware?

    python tools/gpu_attention_check.py [--parts battery,sm80,bits,decode,prefill,write] [--json F]

`battery` compares every geometry with the XLA reference; `sm80` does so with the kernels compiled
for an A100; `bits` asks whether neighbours change a row's bits; the others time the op as a model
of 32 layers calls it, over a KV pool far larger than the caches, with several sizes of program.
Decodes are given as bytes of keys and values over the measured copy bandwidth, prefill as
operations over the measured rate of a matrix product. `--compile-only` needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.attention.kv_pool import write_rows
from models.ops.attention.triton_attention import (
    DEFAULT,
    TritonAttention,
    TritonConfig,
)
from models.ops.attention.triton_call import (
    KernelConfig,
    compile_kernel,
    kernel_types,
    triton_call,
)
from models.ops.attention.work import AttentionTiling, AttentionWork
from tools import attention_cases
from tools.attention_cases import BATTERY, Case, Inputs

NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE = 32, 8, 128, 16
NUM_LAYERS = 32
MAX_CONTEXT = 8192
NUM_SLOTS = 64
CHUNK = 512
PARTS = ("battery", "sm80", "bits", "decode", "prefill", "write")


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
    _decode_config(64, 4, 4, 512),
    _decode_config(64, 4, 5, 512),
    _decode_config(64, 2, 4, 512),
    _decode_config(32, 2, 5, 512),
    _decode_config(32, 4, 5, 512),
    _decode_config(128, 4, 3, 512),
    _decode_config(128, 4, 4, 512),
    _decode_config(128, 8, 4, 512),
    _decode_config(64, 4, 4, 256),
    _decode_config(64, 4, 4, 1024),
)
TILE_CONFIGS = (
    DEFAULT,
    _tile_config(64, 64, 4, 4),
    _tile_config(64, 64, 4, 2),
    _tile_config(64, 128, 4, 3),
    _tile_config(128, 64, 8, 4),
    _tile_config(128, 128, 8, 3),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begins nothing after")
    parser.add_argument("--compile-only", type=int, metavar="CAPABILITY", help="80, 90 ...")
    parser.add_argument("--workers", type=int, default=14, help="processes that compile")
    args = parser.parse_args()
    parts = args.parts.split(",")
    started = perf_counter()
    if args.compile_only:
        _compile(args.compile_only, parts, args.workers)
        return 0
    capability = _device_capability()
    compiler = multiprocessing.get_context("spawn").Process(
        target=_compile, args=(capability, parts, args.workers)
    )
    compiler.start()
    compiler.join()
    print(f"[{perf_counter() - started:.1f} s] kernels compiled", flush=True)
    results = run_parts(parts, capability, started, args.limit_s)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))
    print(f"[{perf_counter() - started:.1f} s] done, {len(results['failures'])} failures")
    return 1 if results["failures"] else 0


def run_parts(
    parts: Sequence[str], capability: int, started: float, limit_s: float
) -> dict[str, Any]:
    """All figures, with `failures` as a list of lines."""
    results: dict[str, Any] = {"device": str(jax.devices()[0].device_kind), "failures": []}
    functions: dict[str, Callable[[int], dict[str, Any]]] = {
        "battery": battery,
        "sm80": lambda device: battery(device, compiled_for=80),
        "bits": check_bits,
        "decode": time_decodes,
        "prefill": time_prefills,
        "write": time_writes,
    }
    for part in parts:
        if perf_counter() - started > limit_s:
            results["failures"].append(f"{part}: not begun, the time was over")
            continue
        begun = perf_counter()
        try:
            results[part] = functions[part](capability)
            results["failures"] += results[part].pop("failures", [])
        except Exception as error:  # one part must not cost the others
            results["failures"].append(f"{part}: {type(error).__name__}: {str(error)[:600]}")
        print(f"--- {part}: {perf_counter() - begun:.1f} s", flush=True)
        for name, value in results.get(part, {}).items():
            print(f"{part:8} {name:58} {value}", flush=True)
    for line in results["failures"]:
        print("FAILED", line, flush=True)
    return results


def _device_capability() -> int:
    return int(float(jax.devices()[0].compute_capability) * 10)


# --- right or wrong ---------------------------------------------------------------------------


def battery(capability: int, compiled_for: int | None = None) -> dict[str, Any]:
    """Relative error of each case of the battery; `failures` says what is wrong."""
    attention = _attention(capability, compiled_for)
    results: dict[str, Any] = {"failures": []}
    for case in BATTERY:
        tiling = attention.tiling(case.page_size, case.num_heads, case.num_kv_heads)
        inputs = attention_cases.build(case, tiling, np.random.default_rng(0))
        expected, _ = attention_cases.run_reference(case, inputs)
        try:
            error = attention_cases.check(case, partial(run_case, attention), inputs, expected)
            results[case.name] = f"{error:.2e}"
        except Exception as error:  # every case is tried
            label = "" if compiled_for is None else f"sm_{compiled_for} "
            results["failures"].append(f"{label}{case.name}: {str(error)[:300]}")
    return results


def _attention(capability: int, compiled_for: int | None = None) -> TritonAttention:
    if compiled_for is None:
        return TritonAttention(capability)
    call = partial(triton_call, device_capability=capability)
    return TritonAttention(compiled_for, call=call)


Step = Callable[..., tuple[jax.Array, jax.Array]]


def run_case(
    attention: TritonAttention, case: Case, inputs: Inputs
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the step's rows and attends; see `attention_cases.Runner`."""
    return _run(jax.jit(partial(_write_and_attend, attention, case, inputs.tiling)), case, inputs)


def _run(step: Step, case: Case, inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
    layer, window = np.int32(inputs.layer), np.int32(case.window or 0)
    out, pool = step(inputs.q, inputs.k, inputs.v, inputs.pool, layer, window, inputs.work)
    return np.asarray(out.astype(jnp.float32)), np.asarray(pool)


def _write_and_attend(
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
    dtype = jnp.dtype(case.dtype)
    prepared = attention.prepare(work, tiling=tiling, dtype=dtype, head_dim=case.head_dim)
    pool = attention.write(pool, k, v, layer, prepared)
    sliding = window if case.is_window_traced else case.window
    return attention(q, pool, layer, prepared, tiling=tiling, sliding_window=sliding), pool


def check_bits(capability: int) -> dict[str, Any]:
    """A sequence alone and among others, in another slot, on other pages: the same bits."""
    attention = _attention(capability)
    mixed = BATTERY[0]
    tiling = attention.tiling(PAGE, mixed.num_heads, mixed.num_kv_heads)
    together = attention_cases.build(mixed, tiling, np.random.default_rng(1))
    step = jax.jit(partial(_write_and_attend, attention, mixed, tiling))
    out, _ = _run(step, mixed, together)
    results: dict[str, Any] = {"failures": []}
    for index, sequence in enumerate(mixed.sequences):
        # Slots and the table's width stay the program's: only the company changes.
        others = attention_cases.Sequence(1)
        alone = dataclasses.replace(
            mixed,
            name=f"{sequence}",
            sequences=tuple(
                sequence if i == index else others for i in range(len(mixed.sequences))
            ),
        )
        rng = np.random.default_rng(2 + index)
        shape = (1, 2, mixed.num_kv_heads, mixed.head_dim)
        dtype = together.contexts[0].dtype
        contexts = tuple(
            together.contexts[i] if i == index else rng.normal(size=shape).astype(dtype)
            for i in range(len(mixed.sequences))
        )
        alone = dataclasses.replace(alone, table_pages=mixed.max_pages)
        inputs = attention_cases.build(alone, tiling, rng, contexts)
        inputs.q[inputs.rows[index]] = together.q[together.rows[index]]
        again, _ = _run(step, alone, inputs)
        same = np.array_equal(again[inputs.rows[index]], out[together.rows[index]])
        results[f"{sequence}"] = "same bits" if same else "OTHER BITS"
        if not same:
            results["failures"].append(f"bits: {sequence} depends on its neighbours")
    return results


# --- timings ----------------------------------------------------------------------------------


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
    """Bytes read and written by a copy of 2 GB."""
    source = jax.random.normal(jax.random.key(0), (2**30,), jnp.bfloat16)
    # Not the identity, which would copy nothing.
    copy = jax.jit(lambda x: -x)
    return 2 * source.nbytes / _seconds(lambda: copy(source), batch=2)


def matmul_flops() -> float:
    size = 8192
    x = jax.random.normal(jax.random.key(1), (size, size), jnp.bfloat16)
    y = jax.random.normal(jax.random.key(2), (size, size), jnp.bfloat16)
    multiply = jax.jit(jnp.matmul)
    return 2 * size**3 / _seconds(lambda: multiply(x, y))


def _random_pool(num_pages: int, num_layers: int) -> jax.Array:
    shape = (num_pages + 1, PAGE, 2, NUM_KV_HEADS, HEAD_DIM)

    @jax.jit
    def fill(key: jax.Array) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            values = jax.random.normal(key, shape, jnp.bfloat16)
            return jax.lax.bitcast_convert_type(values, jnp.uint16)

        pool: jax.Array = jax.lax.map(one, jax.random.split(key, num_layers))
        return pool

    pool: jax.Array = fill(jax.random.key(3))
    return pool


def _work(
    tiling: AttentionTiling,
    num_rows: int,
    decode_contexts: Sequence[int],
    chunks: Sequence[tuple[int, int]],
    num_slots: int = NUM_SLOTS,
) -> AttentionWork:
    """Decodes, then chunks (start, rows), with pages in random order."""
    lengths = [*decode_contexts, *(start + rows for start, rows in chunks)]
    news = [1] * len(decode_contexts) + [rows for _, rows in chunks]
    width = MAX_CONTEXT // PAGE
    total = sum(-(-length // PAGE) for length in lengths)
    pages = np.random.default_rng(0).permutation(total)
    table = np.full((num_slots + 1, width), 0, np.int32)
    row_slots = np.full(num_rows, num_slots, np.int32)
    positions = np.zeros(num_rows, np.int32)
    row = 0
    tiles = []
    for slot, (length, new) in enumerate(zip(lengths, news, strict=True)):
        held = -(-length // PAGE)
        table[slot, :held], pages = pages[:held], pages[held:]
        row_slots[row : row + new] = slot
        positions[row : row + new] = np.arange(length - new, length)
        if slot >= len(decode_contexts):
            for offset in range(0, new, tiling.tile_rows):
                count = min(tiling.tile_rows, new - offset)
                tiles.append((-(length - new + offset), row + offset, count))
        row += new
    decode_rows = np.full(tiling.max_decodes(num_rows, num_slots), num_rows, np.int32)
    decode_rows[: len(decode_contexts)] = np.argsort(-np.asarray(decode_contexts), kind="stable")
    num_tiles = tiling.max_tiles(num_rows, num_slots)
    starts, counts = np.full(num_tiles, num_rows, np.int32), np.zeros(num_tiles, np.int32)
    for index, (_, start, count) in enumerate(sorted(tiles)):
        starts[index], counts[index] = start, count
    arrays = (table, row_slots, positions, decode_rows, np.int32(len(decode_contexts)))
    arrays += (starts, counts, np.int32(len(tiles)))  # type: ignore[assignment]
    return AttentionWork(*(jnp.asarray(array) for array in arrays))


def _layers(
    attention: TritonAttention,
    tiling: AttentionTiling,
    q: jax.Array,
    pool: jax.Array,
    work: AttentionWork,
    num_layers: int,
) -> jax.Array:
    """The attention of a whole model: each layer's output is the next one's queries."""
    prepared = attention.prepare(
        work, tiling=tiling, dtype=jnp.dtype(jnp.bfloat16), head_dim=HEAD_DIM
    )
    for layer in range(num_layers):
        q = attention(q, pool, jnp.int32(layer), prepared, tiling=tiling, sliding_window=None)
    return q


def _queries(num_rows: int) -> jax.Array:
    return jax.random.normal(jax.random.key(4), (num_rows, NUM_HEADS, HEAD_DIM), jnp.bfloat16)


def _name(config: TritonConfig, kind: str) -> str:
    if kind == "decode":
        kernel, sizes = config.decode, f"block {config.decode_block} split {config.split_keys}"
    else:
        kernel, sizes = config.tile, f"rows {config.tile_rows} block {config.tile_block}"
    return f"{sizes} warps {kernel.num_warps} stages {kernel.num_stages}"


DECODE_LOADS = {
    "64 x 1k": [1024] * 64,
    "8 x 8k": [8192] * 8,
    "1 x 8k": [8192],
    "mixed": [8192, 6000, 4096, 4096, 3000] + [1500] * 10 + [500] * 30,
}


def time_decodes(capability: int) -> dict[str, Any]:
    """Share of the copy bandwidth, by sizes of program and load."""
    rate = copy_bytes_per_s()
    results: dict[str, Any] = {"copy": f"{rate / 1e12:.2f} TB/s"}
    pool = _random_pool(NUM_SLOTS * 1024 // PAGE, NUM_LAYERS)
    q = _queries(NUM_SLOTS)
    for config in DECODE_CONFIGS:
        attention = TritonAttention(capability, config)
        tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
        run = jax.jit(partial(_layers, attention, tiling, num_layers=NUM_LAYERS))
        line = []
        for name, contexts in DECODE_LOADS.items():
            work = _work(tiling, NUM_SLOTS, contexts, [])
            seconds = _seconds(partial(run, q, pool, work)) / NUM_LAYERS
            num_bytes = sum(contexts) * 2 * NUM_KV_HEADS * HEAD_DIM * 2
            line.append(f"{name}: {seconds * 1e6:.0f} us {100 * num_bytes / seconds / rate:.0f} %")
        nothing = _work(tiling, NUM_SLOTS, [], [])
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
    pool = _random_pool(NUM_SLOTS * 1024 // PAGE, num_layers)
    q = _queries(CHUNK)
    for config in TILE_CONFIGS:
        attention = TritonAttention(capability, config)
        tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
        run = jax.jit(partial(_layers, attention, tiling, num_layers=num_layers))
        line = []
        for name, chunks in PREFILL_LOADS.items():
            work = _work(tiling, CHUNK, [], chunks)
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
        work = _work(tiling, num_rows, [1000] * NUM_SLOTS, [])
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
            pool = _random_pool(NUM_SLOTS * 1024 // PAGE, NUM_LAYERS)
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


# --- compilation ------------------------------------------------------------------------------


def _compile(capability: int, parts: Sequence[str], num_workers: int) -> None:
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
                tiling = attention.tiling(case.page_size, case.num_heads, case.num_kv_heads)
                inputs = attention_cases.build(case, tiling, np.random.default_rng(0))
                trace = partial(_write_and_attend, attention, case, tiling)
                scalar = jax.ShapeDtypeStruct((), jnp.int32)
                arrays = (inputs.q, inputs.k, inputs.v, inputs.pool)
                jax.eval_shape(trace, *arrays, scalar, scalar, inputs.work)
        configs = {"decode": DECODE_CONFIGS, "prefill": TILE_CONFIGS}.get(part, ())
        for config in configs:
            attention = TritonAttention(capability, config, record)
            tiling = attention.tiling(PAGE, NUM_HEADS, NUM_KV_HEADS)
            num_rows = NUM_SLOTS if part == "decode" else CHUNK
            num_layers = NUM_LAYERS if part == "decode" else 8
            shape = (num_layers, NUM_SLOTS * 1024 // PAGE + 1, PAGE, 2, NUM_KV_HEADS, HEAD_DIM)
            jax.eval_shape(
                partial(_layers, attention, tiling, num_layers=1),
                jax.ShapeDtypeStruct((num_rows, NUM_HEADS, HEAD_DIM), jnp.bfloat16),
                jax.ShapeDtypeStruct(shape, jnp.uint16),
                _work(tiling, num_rows, [], []),
            )
    return list(wanted)


if __name__ == "__main__":
    sys.exit(main())
