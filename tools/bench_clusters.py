"""How long balanced clustering takes, and how that grows with the number of points.

    python tools/bench_clusters.py --points 125000 250000 500000 1000000 --width 384

clusters random unit vectors around 1000 random directions, after a run that compiles, and prints a
line of JSON for each size, then the slope of log seconds over log points.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from jaxserve.xc.clusters import balanced_clusters, num_levels

NUM_DIRECTIONS = 1000


def vectors_of(num_points: int, width: int) -> jax.Array:
    """float32[num_points, width] of length one, around `NUM_DIRECTIONS` directions."""
    rng = np.random.default_rng(0)
    directions = rng.standard_normal((NUM_DIRECTIONS, width), np.float32)
    vectors = rng.standard_normal((num_points, width), np.float32)
    vectors += directions[rng.integers(0, NUM_DIRECTIONS, num_points)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return jnp.asarray(vectors)


def measured(num_points: int, width: int, cluster_size: int) -> dict[str, float]:
    """Seconds of the first clustering, which compiles, and of a second one."""
    vectors = jax.block_until_ready(vectors_of(num_points, width))
    levels = num_levels(num_points, cluster_size)
    seconds = []
    for seed in range(2):
        begin_s = time.perf_counter()
        balanced_clusters(vectors, levels, seed)
        seconds.append(time.perf_counter() - begin_s)
    return {
        "points": num_points,
        "width": width,
        "clusters": 2**levels,
        "first_s": round(seconds[0], 2),
        "seconds": round(seconds[1], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--points", type=int, nargs="+", default=[125_000, 250_000, 500_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--cluster-size", type=int, default=64)
    options = parser.parse_args()
    found = []
    for num_points in options.points:
        found.append(measured(num_points, options.width, options.cluster_size))
        print(json.dumps(found[-1]), flush=True)
    if len(found) > 1:
        logs = np.log([[one["points"], one["seconds"]] for one in found])
        slope = np.polyfit(logs[:, 0], logs[:, 1], 1)[0]
        print(json.dumps({"log_log_slope": round(float(slope), 3)}))


if __name__ == "__main__":
    main()
