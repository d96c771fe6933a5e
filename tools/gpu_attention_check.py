"""The Triton attention on this machine's GPU: is it right, and how near is it to the hardware?

    python tools/gpu_attention_check.py [--parts battery,sm80,bits,decode,prefill,write] [--json F]

`battery` compares every geometry with the dense oracle; `sm80` does so for some with the kernels
compiled for an A100; `bits` asks whether neighbours change a row's bits; the others time the op
as a model of 32 layers calls it, over a KV pool far larger than the caches, with several sizes of
program. Decodes are given as bytes of keys and values over the measured copy bandwidth, prefill
as operations over the measured rate of a matrix product. `--compile-only` needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import jax

from tools.gpu_attention.checks import SHORT_BATTERY, battery, check_bits
from tools.gpu_attention.compiling import compile_all
from tools.gpu_attention.timings import time_decodes, time_prefills, time_writes

PARTS = ("battery", "sm80", "bits", "decode", "prefill", "write")


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
        compile_all(args.compile_only, parts, args.workers)
        return 0
    capability = _device_capability()
    compiler = multiprocessing.get_context("spawn").Process(
        target=compile_all, args=(capability, parts, args.workers)
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
        "sm80": partial(battery, compiled_for=80, names=SHORT_BATTERY),
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


if __name__ == "__main__":
    sys.exit(main())
