"""Serving on one GPU, in one run: `python tools/bench_gpu.py --json gpu.json`.

Llama-3-8B's shape with random bfloat16 weights. Each part is a process of its own:

    ceilings  rates of a copy and of a matrix product on this card
    battery   the attention kernels against the XLA reference
    steps     decode and hybrid steps against their floors
    engine    output tokens per second on requests of a published trace's lengths
    peer      the same requests through transformers' continuous batching
    static    transformers' `generate` with a static cache and torch.compile

`--small` takes a toy shape, to try the parts out where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DEFAULT_PARTS = ("ceilings", "battery", "steps", "engine", "peer", "static")
LIMITS_S = {
    "ceilings": 30,
    "battery": 120,
    "steps": 80,
    "engine": 90,
    "peer": 150,
    "static": 100,
}
"""Longest time of each part; ten minutes hold all of them."""
MEMORY_SHARE = 0.92
"""Of the card, that a part with JAX may take; by default JAX takes three quarters."""


def main() -> int:
    """See the file's head."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(DEFAULT_PARTS), help="parts, by commas")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--small", action="store_true", help="a toy shape, for a dry run")
    parser.add_argument("--attention", default="auto", help="as for jaxserve serve")
    parser.add_argument("--limit-s", type=float, default=570, help="begin no part after this")
    parser.add_argument("--peer-requests", type=int, default=64, help="served by engine and peer")
    parser.add_argument("--static-batch", type=int, default=64)
    parser.add_argument("--profile", action="store_true", help="list the steps' kernels in --json")
    parser.add_argument("--cache-dir", type=Path, help="compiled programs are kept here")
    args = parser.parse_args()
    parts = args.only.split(",")
    unknown = set(parts) - set(DEFAULT_PARTS)
    if unknown:
        parser.error(f"--only {', '.join(sorted(unknown))}: parts are {', '.join(DEFAULT_PARTS)}")
    results: dict[str, Any] = {"seconds": {}, "failures": {}}
    start = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        for part in _in_order(parts):
            left_s = args.limit_s - (perf_counter() - start)
            begun = perf_counter()
            limit_s = min(left_s, LIMITS_S[part])
            options = _options(args, results, Path(folder), limit_s)
            _run_part(part, options, limit_s, results)
            results["seconds"][part] = perf_counter() - begun
            print(f"[{perf_counter() - start:6.1f} s] {part}", flush=True)
            if args.json:
                args.json.write_text(json.dumps(results, indent=1))
    print(table(results))
    return 1 if results["failures"] else 0


def _in_order(parts: Sequence[str]) -> list[str]:
    """With the rates of the card first, if other figures are divided by them."""
    others = [part for part in parts if part != "ceilings"]
    needs_rates = "ceilings" in parts or {"battery", "steps"} & set(others)
    return ["ceilings", *others] if needs_rates else others


def _options(
    args: argparse.Namespace, results: Mapping[str, Any], folder: Path, limit_s: float
) -> dict[str, Any]:
    ceilings = results.get("ceilings", {})
    return {
        "small": args.small,
        "attention": args.attention,
        "rates": ceilings,
        "compute_capability": ceilings.get("compute_capability", 0),
        "cache_dir": str((args.cache_dir or folder / "cache").absolute()),
        "num_requests": 4 if args.small else args.peer_requests,
        "batch_size": args.static_batch,
        "limit_s": limit_s - 20,
        "profile": args.profile,
        "folder": str(folder),
    }


def _run_part(
    part: str, options: Mapping[str, Any], limit_s: float, results: dict[str, Any]
) -> None:
    """One part in a child; its figures or what went wrong end up in `results`."""
    if limit_s < 1 and not options["small"]:
        results["failures"][part] = "not begun: the time was over"
        return
    folder = Path(str(options["folder"]))
    given, out, log = (folder / f"{part}.{end}" for end in ("in.json", "out.json", "log"))
    given.write_text(json.dumps(options))
    # A dry run's time says nothing: it may run beside other work on a slow processor.
    limit_s = 600.0 if options["small"] else limit_s
    command = [sys.executable, "-m", "tools.gpu_bench.worker", part, str(given), str(out)]
    with log.open("wb") as file:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "XLA_PYTHON_CLIENT_MEM_FRACTION": str(MEMORY_SHARE)},
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=limit_s,
                check=False,
            )
            failure = f"exit status {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            failure = f"stopped after {limit_s:.0f} s"
    if failure:
        tail = log.read_text(errors="replace")[-1500:]
        results["failures"][part] = f"{failure}\n{tail}"
    else:
        results[part] = json.loads(out.read_text())


def table(results: Mapping[str, Any]) -> str:
    """The figures for people."""
    lines = []
    if "ceilings" in results:
        rates = results["ceilings"]
        lines.append(
            f"{rates['device']}: copy {rates['copy_bytes_per_s'] / 1e12:.2f} TB/s, "
            f"read {rates['read_bytes_per_s'] / 1e12:.2f} TB/s, "
            f"bf16 product {rates['matmul_flop_per_s'] / 1e12:.0f} TFLOP/s"
        )
    if "battery" in results:
        lines.append(f"attention battery: {len(results['battery']['failures'])} failures")
    for name, step in results.get("steps", {}).items():
        if not isinstance(step, dict) or "step_ms" not in step:
            continue
        share = (
            f"{step['of_floor']:.1%} of the floor ({step['floor_ms']:.2f} ms)"
            if "of_floor" in step
            else f"{step['of_matmul_peak']:.1%} of the product's rate"
        )
        lines.append(
            f"{name:18} {step['step_ms']:8.3f} ms  {share}, host {step['submit_ms']:.3f} ms"
        )
    for name in ("engine", "peer", "static"):
        if name in results:
            rate = results[name]["output_tokens_per_s"]
            lines.append(f"{name:18} {rate:8.0f} output tokens/s")
    if "engine" in results:
        many = results["engine"]["many"]
        lines.append(
            f"{'engine, ' + str(many['num_requests']):18} {many['output_tokens_per_s']:8.0f} "
            "output tokens/s"
        )
    if "engine" in results and "peer" in results:
        ratio = results["engine"]["output_tokens_per_s"] / results["peer"]["output_tokens_per_s"]
        lines.append(f"engine over peer   {ratio:8.2f}")
    lines += [f"FAILED {part}: {why}" for part, why in results["failures"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
