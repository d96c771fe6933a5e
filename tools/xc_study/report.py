"""Tables of the study's records, with paired bootstrap over test points."""

from __future__ import annotations

import base64
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MEASURES = ("P@1", "P@3", "P@5", "nDCG@5", "PSP@1", "PSP@5", "R@10", "coverage@5")
NUM_RESAMPLES = 2000
GOAL_SHARE = 0.95
"""Of the end's validation P@1: what a curriculum should reach sooner."""

COMPARISONS = (
    ("ngame", "random"),
    ("ngame", "tas"),
    ("ngame_centroid", "ngame"),
    ("ance", "ngame"),
    ("classifiers-ngame", "ngame"),
    ("ngame_curriculum", "ngame"),
    ("ngame_stale", "ngame"),
)

Record = Mapping[str, Any]


def read_records(folder: Path) -> dict[str, list[Record]]:
    """Records by method, in order of their seeds."""
    found: dict[str, list[Record]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        record = json.loads(path.read_text())
        prefix = "classifiers-" if record["kind"] == "classifiers" else ""
        found[prefix + record["method"]].append(record)
    return dict(found)


def tables(records: Mapping[str, Sequence[Record]]) -> str:
    """Measures of each method, differences with intervals, and accuracy against time."""
    lines = [
        f"| method | seeds | {' | '.join(MEASURES)} | mining s | training s |",
        f"|---|{'---|' * (len(MEASURES) + 3)}",
    ]
    for name, own in records.items():
        lines.append(_row(name, own, "measures"))
        if own[0]["kind"] == "classifiers":
            lines.append(_row(f"{name}, fused", own, "fused"))
    lines += ["", "| difference in P@1 | seeds | mean | 95 % interval |", "|---|---|---|---|"]
    for first, second in COMPARISONS:
        if first in records and second in records:
            mean, low, high, num_seeds = paired_difference(records[first], records[second])
            lines.append(
                f"| {first} - {second} | {num_seeds} | {mean:+.2f} | {low:+.2f} to {high:+.2f} |"
            )
    lines += ["", *_curriculum_rows(records)]
    lines += [
        "",
        "| method | seed | validation P@1 after so many seconds of training |",
        "|---|---|---|",
    ]
    for name, own in records.items():
        for record in own:
            if "curve" in record:
                points = "; ".join(
                    f"{one['train_s']:.0f} s {one['validation_P@1']:.1f}" for one in record["curve"]
                )
                lines.append(f"| {name} | {record['seed']} | {points} |")
    return "\n".join(lines)


def paired_difference(
    first: Sequence[Record], second: Sequence[Record]
) -> tuple[float, float, float, int]:
    """Mean difference of P@1 over seeds that both have, and its 95 % interval by resampling the
    test points, the same ones for both and for all seeds."""
    by_seed = [{record["seed"]: record for record in own} for own in (first, second)]
    seeds = sorted(by_seed[0].keys() & by_seed[1].keys())
    if not seeds:
        return float("nan"), float("nan"), float("nan"), 0
    differences = np.mean(
        [right_at_1(by_seed[0][seed]) - right_at_1(by_seed[1][seed]) for seed in seeds], axis=0
    )
    rng = np.random.default_rng(0)
    size = len(differences)
    means = [differences[rng.integers(0, size, size)].mean() for _ in range(NUM_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return 100 * float(differences.mean()), 100 * float(low), 100 * float(high), len(seeds)


def right_at_1(record: Record) -> npt.NDArray[np.float64]:
    """For each test point 1 if its first label is right, else 0."""
    bits = np.frombuffer(base64.b64decode(record["right_at_1"]), np.uint8)
    return np.unpackbits(bits)[: record["num_test"]].astype(np.float64)


def steps_to_share(record: Record, goal: float) -> int:
    """Steps until validation P@1 first reached `goal`, between evaluations in proportion."""
    before_step, before = 0, 0.0
    for one in record["curve"]:
        step, value = one["step"], one["validation_P@1"]
        if value >= goal:
            share = (goal - before) / (value - before)
            return int(before_step + share * (step - before_step))
        before_step, before = step, value
    raise ValueError(f"validation P@1 of {record['method']} never reaches {goal:.2f}")


def _curriculum_rows(records: Mapping[str, Sequence[Record]]) -> list[str]:
    """Steps of both kinds of clusters to 95 % of what fixed ones end with, seed by seed."""
    fixed = {record["seed"]: record for record in records.get("ngame", ())}
    lines = [
        "| seed | fixed clusters: steps to 95 % of their end | growing ones | difference |",
        "|---|---|---|---|",
    ]
    for record in records.get("ngame_curriculum", ()):
        if record["seed"] in fixed:
            own = fixed[record["seed"]]
            goal = GOAL_SHARE * own["curve"][-1]["validation_P@1"]
            steps = steps_to_share(own, goal), steps_to_share(record, goal)
            change = 100 * (steps[1] / steps[0] - 1)
            lines.append(f"| {record['seed']} | {steps[0]} | {steps[1]} | {change:+.1f} % |")
    return lines


def _row(name: str, own: Sequence[Record], key: str) -> str:
    values = [f"{np.mean([record[key][one] for record in own]):.2f}" for one in MEASURES]
    times = [
        f"{np.mean([record[one] for record in own]):.0f}" if one in own[0] else ""
        for one in ("mining_s", "train_s")
    ]
    return f"| {name} | {len(own)} | {' | '.join([*values, *times])} |"
