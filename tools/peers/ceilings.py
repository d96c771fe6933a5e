"""What this machine can do at most: bytes copied and operations a second.

    python -m tools.peers.ceilings

in a process of its own, without the variables that choose a BLAS kernel by hand.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

import numpy as np

COPY_BYTES = 256 << 20
MATRIX_SIZE = 2048
NUM_REPEATS = 5
BLAS_CHOICES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


@dataclass(frozen=True, slots=True)
class Ceilings:
    bytes_per_s: float
    """Read plus written, by a copy on all cores."""
    flops_per_s: float
    """Of a float32 product of square matrices on all cores."""
    num_cores: int


def measure_ceilings() -> Ceilings:
    """In a child process; takes some seconds."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.peers.ceilings"],
        env={name: value for name, value in os.environ.items() if name not in BLAS_CHOICES},
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return Ceilings(**json.loads(done.stdout))


def _measure() -> Ceilings:
    num_cores = len(os.sched_getaffinity(0))
    source = np.ones((num_cores, COPY_BYTES // num_cores // 8))
    target = np.zeros_like(source)
    with ThreadPoolExecutor(num_cores) as threads:

        def copy() -> None:
            # NumPy lets go of the interpreter while it copies.
            list(threads.map(np.copyto, target, source))

        copy_s = best_s(copy)
    square = np.ones((MATRIX_SIZE, MATRIX_SIZE), np.float32)
    product_s = best_s(lambda: square @ square)
    return Ceilings(2 * source.nbytes / copy_s, 2.0 * MATRIX_SIZE**3 / product_s, num_cores)


def best_s(work: Callable[[], object]) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    work()
    seconds = []
    for _ in range(NUM_REPEATS):
        start_s = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds)


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a token costs at least."""

    num_layer_weights: int
    num_head_weights: int
    num_layers: int
    attention_width: int
    """Query heads times head dimension."""
    kv_width: int
    """KV heads times head dimension."""

    def flops(self, num_prompt_tokens: int, num_output_tokens: int) -> float:
        """Of one request: products and attention to what comes before; head rows that sample."""
        num_rows = num_prompt_tokens + num_output_tokens - 1
        products = 2.0 * (
            num_rows * self.num_layer_weights + num_output_tokens * self.num_head_weights
        )
        pairs = num_rows * (num_rows + 1) / 2
        return products + 4.0 * self.num_layers * self.attention_width * pairs

    def kv_bytes(self, num_prompt_tokens: int, num_output_tokens: int, value_bytes: int) -> float:
        """Keys and values that one request's decodes read."""
        contexts = sum(num_prompt_tokens + index for index in range(1, num_output_tokens))
        return 2.0 * self.num_layers * self.kv_width * value_bytes * contexts


def floor_s(
    lengths: Sequence[tuple[int, int]],
    model: ModelSize,
    ceilings: Ceilings,
    *,
    weights_bytes: int,
    kv_value_bytes: int,
) -> float:
    """No engine with weights of this format finishes a load in less time on this machine, were
    its kernels float32's: all operations at the peak, or all bytes at the copy's rate.

    The weights are read once for each token of the longest output; every request in flight shares
    that.

    Args:
        lengths: prompt and output tokens of each request.
        model: its size.
        ceilings: of the machine.
        weights_bytes: of all weights, as the engine holds them.
        kv_value_bytes: of one number in the KV cache.
    """
    flops = sum(model.flops(*pair) for pair in lengths)
    num_passes = max(num_output for _, num_output in lengths)
    num_bytes = num_passes * weights_bytes + sum(
        model.kv_bytes(*pair, kv_value_bytes) for pair in lengths
    )
    return max(flops / ceilings.flops_per_s, num_bytes / ceilings.bytes_per_s)


if __name__ == "__main__":
    print(json.dumps(asdict(_measure())))
