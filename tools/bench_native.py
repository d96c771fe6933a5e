"""The native kernels' products against XLA's and against what the machine can do.

    python tools/bench_native.py [--rows 1 8 32 128] [--repeats 5] [--json]

All projections of the default model's shape, as one program, native and XLA in turns. A product
reads its weights once and multiplies them with every row, so each figure is also given as a
fraction of its floor: the larger of bytes over bandwidth (a sum over an array that fits no cache)
and multiplications over the peak (an XLA product of square float32 matrices). Both are measured
here, with the threads that JAX and the kernels use. Integer products can exceed that peak.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from functools import partial
from statistics import median
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.ops.native import load_library
from models.ops.packed import Kind, PackedKernel, abstract_packed

NUM_LAYERS, WIDTH, FFN = 30, 576, 1536
SHAPES = {
    "qkv": (WIDTH, 960),
    "o": (WIDTH, WIDTH),
    "gate_up": (WIDTH, 2 * FFN),
    "down": (FFN, WIDTH),
}
NUM_WEIGHTS = NUM_LAYERS * sum(num_in * num_out for num_in, num_out in SHAPES.values())
PEAK_SIZE = 2048
BANDWIDTH_BYTES = 1 << 28

Layer = Callable[[str, jax.Array], jax.Array]


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    library = load_library()
    machine = {
        "instruction_set": library.instruction_sets()[0],
        "num_threads": library.num_threads,
        "bandwidth_gb_per_s": bandwidth(args.repeats),
        "peak_gflop_per_s": peak(args.repeats),
    }
    kernels = {kind: random_kernels(kind) for kind in Kind}
    floats = {
        name: jnp.ones((NUM_LAYERS, *shape), jnp.float32) * 1e-2 for name, shape in SHAPES.items()
    }
    rows = []
    for num_rows in args.rows:
        x = jnp.ones((num_rows, WIDTH), jnp.float32)
        runs: dict[str, Callable[[], Any]] = {"XLA FLOAT32": partial(xla_layers, x, floats)}
        for kind, packed in kernels.items():
            runs[kind.name] = partial(native_layers, x, packed)
        for name, seconds in in_turns(runs, args.repeats).items():
            num_bytes = 4 * NUM_WEIGHTS
            if name in Kind.__members__:
                num_bytes = sum(kernel.blocks.nbytes for kernel in kernels[Kind[name]].values())
            rows.append(figures(machine, name, num_rows, num_bytes, seconds))
    if args.json:
        print(json.dumps({"machine": machine, "rows": rows}, indent=2))
        return
    print(machine)
    for row in rows:
        print("  ".join(f"{key} {value}" for key, value in row.items()))


def figures(
    machine: Mapping[str, Any], name: str, num_rows: int, num_bytes: int, seconds: float
) -> dict[str, Any]:
    """One line of the table."""
    flop = 2 * NUM_WEIGHTS * num_rows
    floor_s = (
        max(num_bytes / machine["bandwidth_gb_per_s"], flop / machine["peak_gflop_per_s"]) / 1e9
    )
    return {
        "weights": name,
        "num_rows": num_rows,
        "ms": round(1e3 * seconds, 2),
        "gb_per_s": round(num_bytes / seconds / 1e9, 2),
        "gflop_per_s": round(flop / seconds / 1e9, 1),
        "of_floor": round(floor_s / seconds, 3),
    }


def random_kernels(kind: Kind) -> dict[str, PackedKernel]:
    """Packed bytes without a meaning; small, so that no float among them is huge."""
    rng = np.random.default_rng(0)
    made = {}
    for name, (num_in, num_out) in SHAPES.items():
        shape = abstract_packed(kind, NUM_LAYERS, num_in, num_out).blocks.shape
        blocks = jnp.asarray(rng.integers(0, 60, shape, dtype=np.uint8))
        made[name] = PackedKernel(blocks, kind, num_in, num_out)
    return made


@jax.jit
def native_layers(x: jax.Array, kernels: dict[str, PackedKernel]) -> jax.Array:
    """All layers' projections, each on a part of the one before."""

    def body(rows: jax.Array, layer: jax.Array) -> tuple[jax.Array, tuple[()]]:
        return _layer(rows, lambda name, part: kernels[name].multiply(part, layer)), ()

    return jax.lax.scan(body, x, jnp.arange(NUM_LAYERS))[0]


@jax.jit
def xla_layers(x: jax.Array, kernels: dict[str, jax.Array]) -> jax.Array:
    """The same with stacked float32 weights, as the step without native kernels has them."""

    def body(rows: jax.Array, layer: dict[str, jax.Array]) -> tuple[jax.Array, tuple[()]]:
        return _layer(rows, lambda name, part: part @ layer[name]), ()

    return jax.lax.scan(body, x, kernels)[0]


def _layer(x: jax.Array, multiply: Layer) -> jax.Array:
    small = 1e-3
    o = multiply("o", small * multiply("qkv", x)[:, :WIDTH])
    return small * multiply("down", small * multiply("gate_up", small * o)[:, :FFN])


def bandwidth(repeats: int) -> float:
    """GB/s of reading by one XLA reduction."""
    array = jnp.ones(BANDWIDTH_BYTES // 4, jnp.float32)
    total = jax.jit(lambda a: a.reshape(64, -1).sum(-1))
    return BANDWIDTH_BYTES / in_turns({"": lambda: total(array)}, repeats)[""] / 1e9


def peak(repeats: int) -> float:
    """GFLOP/s of an XLA product of square float32 matrices."""
    matrix = jnp.ones((PEAK_SIZE, PEAK_SIZE), jnp.float32)
    product = jax.jit(jnp.matmul)
    return 2 * PEAK_SIZE**3 / in_turns({"": lambda: product(matrix, matrix)}, repeats)[""] / 1e9


def in_turns(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each, one after the other in every turn, after one that warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            start = perf_counter()
            jax.block_until_ready(run())
            if turn:
                seconds[name].append(perf_counter() - start)
    return {name: median(values) for name, values in seconds.items()}


if __name__ == "__main__":
    main()
