"""Makes jaxserve/simulator/data/a100.json from public profile CSVs.

The CSVs (linear operators, attention, all-reduce of A100-80GB GPUs) come from
https://github.com/microsoft/vidur, MIT licence. They are not part of this
project; the JSON keeps thinned curves and fitted constants.

    python tools/fit_a100.py --profile FOLDER
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import numpy as np

from jaxserve.simulator.cost_models.curve import Curve, thinned
from jaxserve.simulator.cost_models.operators import AttentionTimes, Knots, read_profile
from jaxserve.simulator.csv_file import read_csv

OUT = Path(__file__).parents[1] / "jaxserve" / "simulator" / "data" / "a100.json"
LINEAR_TOLERANCE = 0.025
NETWORK_TOLERANCE = 0.1
MAX_ALL_REDUCE_BYTES = 300e6
"""The widest step of the deployments stays below."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", type=Path, required=True, help="folder of the CSVs")
    profile: Path = parser.parse_args().profile
    attention = _fit_attention(profile / "gqa64q8kv-h8192-tp2.attention.csv")
    times = read_profile(profile, attention)
    all_reduce = {
        key: [knot for knot in knots if knot[0] <= MAX_ALL_REDUCE_BYTES]
        for key, knots in times.all_reduce.items()
    }
    data: dict[str, object] = {
        "device": "A100-80GB",
        "provenance": {
            "source": "https://github.com/microsoft/vidur, data/profiling (MIT licence)",
            "made_by": "tools/fit_a100.py",
            "units": "milliseconds of one layer on one GPU; x is tokens or bytes",
            "thinning": f"straight lines stay within {LINEAR_TOLERANCE:.1%} (operators) or "
            f"{NETWORK_TOLERANCE:.0%} (all-reduce) of every measured median",
            "attention": "least squares of relative error, FlashAttention, 32 query and 4 KV heads "
            "of 128 on one GPU",
        },
        "linear_ms": _thin_all(times.linear, LINEAR_TOLERANCE),
        "elementwise_ms": _thin_all(times.elementwise, 2 * LINEAR_TOLERANCE),
        "all_reduce_ms": _thin_all(all_reduce, NETWORK_TOLERANCE),
        "attention": asdict(attention),
    }
    OUT.write_text(_dump(data), encoding="utf-8")
    print(f"{OUT}: {OUT.stat().st_size} bytes")


def _thin_all(curves: Mapping[str, Knots], tolerance: float) -> dict[str, Knots]:
    thin = {}
    for key, knots in sorted(curves.items()):
        thin[key] = [(float(round(x)), round(y, 5)) for x, y in thinned(knots, tolerance)]
        curve = Curve(thin[key])
        worst = max(abs(curve(x) / y - 1) for x, y in knots)
        print(f"{key}: {len(knots)} -> {len(thin[key])} knots, worst error {worst:.1%}")
    return thin


def _fit_attention(path: Path) -> AttentionTimes:
    rows = read_csv(path)
    decode = [row for row in rows if row["is_prefill"] == "False"]
    keys = np.array([int(row["batch_size"]) * int(row["kv_cache_size"]) for row in decode])
    decode_ms = np.array([float(row["time_stats.attn_decode.median"]) for row in decode])
    base, per_key = _relative_least_squares([np.ones(len(keys)), keys], decode_ms, "decode")
    prefill = [row for row in rows if row["is_prefill"] == "True"]
    tokens = np.array([int(row["prefill_chunk_size"]) for row in prefill])
    computed = np.array([int(row["kv_cache_size"]) for row in prefill])
    prefill_ms = np.array([float(row["time_stats.attn_prefill.median"]) for row in prefill])
    columns = [np.ones(len(tokens)), tokens, tokens * (computed + tokens / 2)]
    chunk, per_token, per_pair = _relative_least_squares(columns, prefill_ms, "prefill")
    return AttentionTimes(
        decode_ms=base,
        decode_ms_per_key=per_key,
        kv_width=512,
        prefill_ms=chunk,
        prefill_ms_per_token=per_token,
        prefill_ms_per_pair=per_pair,
        q_heads=32,
    )


def _relative_least_squares(
    columns: list[np.ndarray], values: np.ndarray, name: str
) -> list[float]:
    matrix = np.stack(columns, axis=1) / values[:, None]
    fit, *_ = np.linalg.lstsq(matrix, np.ones(len(values)), rcond=None)
    error = np.mean(np.abs(matrix @ fit - 1))
    print(f"attention {name}: {len(values)} rows, mean relative error {error:.1%}")
    return [float(f"{value:.4g}") for value in fit]


def _dump(data: dict[str, object]) -> str:
    """JSON with one curve a line."""
    parts = []
    for key, value in data.items():
        if key.endswith("_ms") and isinstance(value, dict):
            curves = [
                f"  {json.dumps(name)}: {json.dumps([(int(x), y) for x, y in knots])}"
                for name, knots in value.items()
            ]
            parts.append(f" {json.dumps(key)}: {{\n" + ",\n".join(curves) + "\n }")
        else:
            text = json.dumps(value, indent=1).replace("\n", "\n ")
            parts.append(f" {json.dumps(key)}: {text}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main()
