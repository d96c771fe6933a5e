"""OperatorTimes: measured times of one kind of GPU, whatever the source.

`fitted` reads them from the package's own JSON, `table` from public CSVs.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from statistics import median

from jaxserve.errors import ConfigError
from jaxserve.simulator.cost_models.curve import Curve
from jaxserve.simulator.csv_file import read_csv

LINEAR_OPERATORS = ("attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj")
ELEMENTWISE_OPERATORS = (
    "input_layernorm",
    "attn_rope",
    "post_attention_layernorm",
    "mlp_act",
    "add",
)

Knots = list[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class AttentionTimes:
    """Milliseconds of one layer on one GPU, linear in a step's totals."""

    decode_ms: float
    decode_ms_per_key: float
    """For `kv_width` key elements (KV heads x head dimension)."""
    kv_width: int
    prefill_ms: float
    prefill_ms_per_token: float
    prefill_ms_per_pair: float
    """For `q_heads` query heads of dimension 128."""
    q_heads: int


@dataclass(frozen=True, slots=True)
class OperatorTimes:
    """Curves in milliseconds for one layer on one GPU.

    Keys of `linear` and `elementwise` are "model/tpN", over tokens; those of
    `all_reduce` are "fabric/tpN", over bytes.
    """

    linear: Mapping[str, Knots]
    elementwise: Mapping[str, Knots]
    all_reduce: Mapping[str, Knots]
    attention: AttentionTimes

    def curve(self, kind: str, key: str) -> Curve:
        """Raises ConfigError naming what there is."""
        curves: Mapping[str, Knots] = getattr(self, kind)
        if key not in curves:
            raise ConfigError(
                f"there is no measured {kind.replace('_', '-')} time for {key}: choose one of "
                f"{', '.join(sorted(curves))} (--tensor-parallel), or --cost-model roofline"
            )
        return Curve(curves[key])


def packaged_a100() -> OperatorTimes:
    """The constants that come with the package, for A100-80GB."""
    text = (resources.files("jaxserve.simulator") / "data" / "a100.json").read_text("utf-8")
    data = json.loads(text)
    return OperatorTimes(
        linear={key: _pairs(knots) for key, knots in data["linear_ms"].items()},
        elementwise={key: _pairs(knots) for key, knots in data["elementwise_ms"].items()},
        all_reduce={key: _pairs(knots) for key, knots in data["all_reduce_ms"].items()},
        attention=AttentionTimes(**data["attention"]),
    )


def read_profile(folder: Path, attention: AttentionTimes) -> OperatorTimes:
    """Public profile CSVs of a folder: `NAME.mlp.csv`, `NAME.all_reduce.csv`.

    `attention` is taken as it is: the public table covers one shape only.
    Raises ConfigError if a file is missing or has other columns.
    """
    linear: dict[str, Knots] = {}
    elementwise: dict[str, Knots] = {}
    all_reduce: dict[str, Knots] = {}
    mlp_files = sorted(folder.glob("*.mlp.csv"))
    if not mlp_files:
        raise ConfigError(f"--profile {folder} holds no *.mlp.csv: give a folder of profile CSVs")
    for path in mlp_files:
        name = path.name.removesuffix(".mlp.csv")
        for size, rows in _by_int(path, "num_tensor_parallel_workers").items():
            linear[f"{name}/tp{size}"] = _medians(rows, "num_tokens", LINEAR_OPERATORS)
            elementwise[f"{name}/tp{size}"] = _medians(rows, "num_tokens", ELEMENTWISE_OPERATORS)
    for path in sorted(folder.glob("*.all_reduce.csv")):
        name = path.name.removesuffix(".all_reduce.csv")
        for size, rows in _by_int(path, "num_workers").items():
            # All workers in one node; smaller groups per node would cross the network.
            one_node = [row for row in rows if int(row["devices_per_node"]) == size]
            if one_node:
                all_reduce[f"{name}/tp{size}"] = _medians(one_node, "size", ("all_reduce",))
    return OperatorTimes(linear, elementwise, all_reduce, attention)


def _by_int(path: Path, column: str) -> dict[int, list[dict[str, str]]]:
    groups: defaultdict[int, list[dict[str, str]]] = defaultdict(list)
    for row in read_csv(path):
        if column not in row:
            raise ConfigError(f"{path} has no column {column}: it is not a profile of this kind")
        groups[int(row[column])].append(row)
    return dict(groups)


def _medians(rows: Iterable[Mapping[str, str]], over: str, operators: Iterable[str]) -> Knots:
    """Sum of the operators' median times; several rows of one x are averaged by median."""
    columns = [f"time_stats.{name}.median" for name in operators]
    times: defaultdict[float, list[float]] = defaultdict(list)
    for row in rows:
        if all(row.get(column) for column in columns):
            times[float(row[over])].append(sum(float(row[column]) for column in columns))
    return [(x, median(times[x])) for x in sorted(times)]


def _pairs(knots: Iterable[Iterable[float]]) -> Knots:
    return [(x, y) for x, y in knots]
